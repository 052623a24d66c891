"""Helpers that know nothing about diffusion: errors, files, randomness, memory, torch modes and console output."""
