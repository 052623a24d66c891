"""Commented example configurations, one YAML file each, for `seppo-fast train`."""
