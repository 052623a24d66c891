"""Methods that learn from the scores of generated pictures."""
