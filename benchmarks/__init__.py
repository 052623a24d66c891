"""Benchmarks and experiments. The tables in README.md and docs/ are generated from the results in `results/`."""
