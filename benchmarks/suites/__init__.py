"""The suites of `python -m benchmarks.run`."""
