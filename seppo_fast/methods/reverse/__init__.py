"""Methods that train on the steps of the sampler."""
