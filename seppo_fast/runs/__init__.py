"""A run's folder on disk: states, log, weights."""
