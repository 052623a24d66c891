"""Loading of diffusers pipelines, with errors that name what is wrong."""
