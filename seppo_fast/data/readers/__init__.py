"""Readers of data sets, one module per layout: folders, listings, tables, shards, videos and embedded worlds."""
