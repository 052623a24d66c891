"""Scripts that make the pipelines and pictures shipped in `seppo_fast/shapes/`."""
