"""Latents and prompt embeddings, computed once and kept."""
