"""What `python -m benchmarks.gpu_check` looks at."""
