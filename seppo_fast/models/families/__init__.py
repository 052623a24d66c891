"""The model families, one file per family."""
