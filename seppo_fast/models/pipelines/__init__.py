"""Reads pipeline folders, or refuses them by name."""
