"""The embedded worlds of captioned shapes (pictures and clips), with exact judges and small pipelines to align."""

import shutil
from pathlib import Path

_HERE = Path(__file__).resolve().parent
PIPELINE = _HERE / "pipeline"
"""The folder of the shipped pipeline for pictures, in the diffusers format."""
MOTION_PIPELINE, MOTION_ADAPTER = _HERE / "motion_pipeline", _HERE / "motion_adapter"
"""The folders of the shipped pipeline for clips, without the parts that it shares with `PIPELINE`, and its adapter."""
MADE = _HERE / "made.safetensors"
"""The file of latents of pictures that the shipped pipeline made, and of their scores; see `seppo_fast.shapes.made`."""
SHIPPED = {"shapes": PIPELINE, "shapes-motion": MOTION_PIPELINE}
"""The folders of the shipped pipelines, by the name that `model.path` uses."""


def part_folder(pipeline: Path | str, part: str) -> Path:
    """Returns the folder of a pipeline's part; the shipped pipeline for clips shares VAE and tokenizer with `PIPELINE`.

    Args:
        pipeline: the folder of any pipeline.
        part: the name of the part, such as "vae".
    """
    shared = Path(pipeline) == MOTION_PIPELINE and not (MOTION_PIPELINE / part).exists()
    return (PIPELINE if shared else Path(pipeline)) / part


def pipeline_folder(path: Path | str, name: str = "shapes") -> Path:
    """Writes a shipped pipeline with all its parts into a folder that diffusers can load.

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
    for source in (PIPELINE, SHIPPED[name]):  # parts of the second replace those of the first
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md"))
    shutil.copy(SHIPPED[name] / "README.md", folder)
    return folder
