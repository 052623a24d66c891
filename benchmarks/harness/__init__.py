"""What the suites measure with, and what they compare."""
