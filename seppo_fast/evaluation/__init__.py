"""Pictures of a model, and statistics of their scores."""
