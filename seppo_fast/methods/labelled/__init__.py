"""Methods that learn from labels in the data, without sampling."""
