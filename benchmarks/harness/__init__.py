"""Shared code of the benchmark suites: timing, counting, test models, and the implementations that they compare."""
