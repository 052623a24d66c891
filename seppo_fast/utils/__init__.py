"""Knows nothing of diffusion: errors, files, randomness, memory, what is printed."""
