"""Reads one picture or one clip."""
