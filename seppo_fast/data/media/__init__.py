"""Decoding of single images and clips."""
