"""The comparison of all training methods; the command is `benchmarks.methods`."""
