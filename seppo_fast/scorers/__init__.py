"""What gives pictures a score for their prompts: for evaluation, and as rewards."""
