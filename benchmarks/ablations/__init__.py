"""What `python -m benchmarks.ablation` trains and compares: rows (methods), regimes, pieces of work, tables."""
