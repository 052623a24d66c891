"""What `python -m benchmarks.gpu_check` and `python -m benchmarks.anchor` look at."""
