"""Generates a model's pictures, has them judged, and compares scores statistically."""
