"""Data sets of (prompt, winner[, loser]), images or clips, and the latent and embedding cache that training reads.

`sources.open_source` detects a data set's format and opens it, `scan.scan` lists its bad files, and
`cache.opening.open_or_build` encodes it once to disk. Nothing here depends on a model: callers pass an encoder.
"""
