"""DITTO: a method that also learns from the samples of earlier iterations."""
