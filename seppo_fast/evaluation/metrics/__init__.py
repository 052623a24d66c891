"""Metrics that compare generated pictures or clips with real ones: distances of distributions, similarity of pairs."""
