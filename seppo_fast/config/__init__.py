"""The configuration of a run: its keys, the objectives, YAML files, recipes and command-line overrides."""
