"""What `python -m benchmarks.ablation` trains and compares: rows, regimes, pieces of work, tables."""
