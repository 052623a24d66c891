"""Compares generated media with real pictures or clips: `seppo-fast score --real FOLDER --metrics ...`."""
