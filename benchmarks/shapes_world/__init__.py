"""Makes the embedded worlds' pipelines, which ship in `seppo_fast/shapes/`."""
