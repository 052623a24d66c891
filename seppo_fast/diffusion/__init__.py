"""The mathematics of noising and sampling, independent of models and runs."""
