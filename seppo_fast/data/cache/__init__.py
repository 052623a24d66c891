"""The on-disk cache of latents and prompt embeddings."""
