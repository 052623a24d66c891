"""Processes, the machines they run on, and shards of a model among them."""
