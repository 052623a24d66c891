"""Scorers of pictures and clips for given prompts, for evaluation and as rewards."""
