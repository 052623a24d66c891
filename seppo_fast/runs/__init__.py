"""A training run's folder on disk: saved states, log and weights."""
