"""The models that are trained. Code outside this package uses them only through `family.Family`."""
