"""Losses of per-row numbers: denoising errors and weights go in, losses and their slopes in the errors come out."""
