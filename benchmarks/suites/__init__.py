"""The benchmark suites that `python -m benchmarks.run` runs."""
