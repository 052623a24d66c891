"""One module a kind of place that holds winners: folders, listings, tables, shards, videos."""
