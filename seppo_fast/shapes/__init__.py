"""The embedded worlds of captioned shapes, still and moving: exact judges, and small pipelines to align."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
PIPELINE = _HERE / "pipeline"
"""Folder of the shipped pipeline for pictures, in the diffusers format."""
MOTION_PIPELINE, MOTION_ADAPTER = _HERE / "motion_pipeline", _HERE / "motion_adapter"
"""Folders of the shipped pipeline for clips, and of its motion adapter."""
SHIPPED = {"shapes": PIPELINE, "shapes-motion": MOTION_PIPELINE}
"""The names that `model.path` has for them."""
