"""Distributed training: processes, the memory that those of one machine share, and sharded models."""
