"""Estimates how much memory a run needs and how long it takes, and chooses batch sizes that fit."""
