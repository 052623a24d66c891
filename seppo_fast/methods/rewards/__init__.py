"""Rewards: scores of samples, and what a loss weighs them with."""
