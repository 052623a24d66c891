"""What is trained. Nothing outside this package knows a model's parts."""
