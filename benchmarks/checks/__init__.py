"""The checks and measurements behind `python -m benchmarks.gpu_check` and `python -m benchmarks.anchor`."""
