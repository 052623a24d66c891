"""The scores of generated media, and the tables that compare models."""
