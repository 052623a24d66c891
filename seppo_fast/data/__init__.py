"""Sources of (prompt, winner[, loser]), images or clips, and the latent and embedding cache that training reads.

`sources.open_source` finds out what a data set is, `scan.scan` names its bad files, and `cache.opening.open_or_build`
encodes it once to disk. Nothing here knows a model: an encoder is handed in.
"""
