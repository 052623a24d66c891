"""The mathematics of noising and sampling; knows no model and no run."""
