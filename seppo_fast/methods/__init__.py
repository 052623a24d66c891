"""The training methods: what each update learns from, and its loss."""
