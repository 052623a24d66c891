"""The embedded worlds of captioned shapes, still and moving: exact judges, and small pipelines to align."""

import shutil
from pathlib import Path

_HERE = Path(__file__).resolve().parent
PIPELINE = _HERE / "pipeline"
"""Folder of the shipped pipeline for pictures, in the diffusers format."""
MOTION_PIPELINE, MOTION_ADAPTER = _HERE / "motion_pipeline", _HERE / "motion_adapter"
"""Folders of the shipped pipeline for clips, without the parts that it shares, and of its motion adapter."""
MADE = _HERE / "made.safetensors"
"""Latents of pictures that the shipped pipeline made, with their scores; see `seppo_fast.shapes.made`."""
SHIPPED = {"shapes": PIPELINE, "shapes-motion": MOTION_PIPELINE}
"""The names that `model.path` has for them."""


def part_folder(pipeline: Path | str, part: str) -> Path:
    """Returns the folder of a part of a pipeline; the shipped one for clips has its VAE and tokenizer from the other.

    Args:
        pipeline: the folder of any pipeline.
        part: the name of the part.
    """
    shared = Path(pipeline) == MOTION_PIPELINE and not (MOTION_PIPELINE / part).exists()
    return (PIPELINE if shared else Path(pipeline)) / part


def pipeline_folder(path: Path | str, name: str = "shapes") -> Path:
    """Writes a shipped pipeline with all its parts, as a folder that diffusers loads by itself.

    Args:
        path: the folder to write; it may exist.
        name: a key of `SHIPPED`.

    Returns:
        `path`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SHIPPED:
        raise ValueError(f"name must be one of {', '.join(SHIPPED)}, got {name!r}")
    folder = Path(path)
    for source in (PIPELINE, SHIPPED[name]):  # what the second one has of its own replaces the first one's
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
    shutil.copy(SHIPPED[name] / "README.md", folder)
    return folder
