"""The model families, by the class of pipeline that their folders name."""

from __future__ import annotations

from pathlib import Path

import torch

from seppo_fast import shapes
from seppo_fast.config.schema import Config, ModelConfig
from seppo_fast.models.families.animatediff import AnimateDiff
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.models.family import Family
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json

_FAMILIES: dict[str, type[Family]] = {}


def register(family: type[Family]) -> type[Family]:
    """Makes a family known by its `pipelines`; a decorator, also for families outside this package.

    It is found for folders whose `model_index.json` names one of them, not for hub ids.

    Raises:
        ValueError: it names no pipeline, or one of another family.
    """
    if not family.pipelines:
        raise ValueError(f"{family.__name__}.pipelines must name at least one class of pipeline")
    for name in family.pipelines:
        if _FAMILIES.setdefault(name, family) is not family:
            raise ValueError(f"{family.__name__}.pipelines: {name!r} is that of {_FAMILIES[name].__name__}")
    return family


register(StableDiffusion)
register(AnimateDiff)


def family_of(model: ModelConfig) -> type[Family]:
    """Returns the family that a configuration asks for; no weight is read.

    A folder says it in its `model_index.json`. Of what cannot be read, and of a hub id, Stable Diffusion's loading says
    what is wrong.
    """
    if model.motion_adapter:
        return AnimateDiff
    try:
        folder = shapes.SHIPPED.get(model.path) or Path(model.path).expanduser()
        return _FAMILIES.get(read_json(folder / "model_index.json")["_class_name"], StableDiffusion)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return StableDiffusion


def validate_model(config: Config) -> type[Family]:
    """Returns the family that a configuration asks for, once its settings go with it; no weight is read.

    Raises:
        ConfigError: what does not fit, and what to do.
    """
    model = config.model
    if model.path in shapes.SHIPPED and (model.path == "shapes-motion") != (model.motion_adapter == "shapes"):
        raise ConfigError(
            "the embedded parts go together: model.path = shapes for pictures; model.path = shapes-motion with "
            "model.motion_adapter = shapes for clips"
        )
    family = family_of(model)
    family.validate(config)
    return family


def refuse_other_kind(config: Config, clips: bool) -> None:
    """Refuses a model of pictures for data that hold clips, and the other way round.

    Raises:
        ConfigError: what does not fit, and what to do.
    """
    makes_clips = family_of(config.model).makes_clips
    if clips and not makes_clips:
        raise ConfigError(
            f"data.source = {config.data.source!r} holds clips: give model.motion_adapter, a folder or hub id of a "
            "MotionAdapter that fits model.path (empty only where that is the folder of an AnimateDiffPipeline)"
        )
    if makes_clips and not clips:
        adapter = config.model.motion_adapter
        what, instead = (
            (f"model.motion_adapter = {adapter!r}", "leave the adapter out")
            if adapter
            else (f"model.path = {config.model.path!r}, an AnimateDiffPipeline,", "give a Stable Diffusion pipeline")
        )
        raise ConfigError(
            f"{what} makes clips, and data.source = {config.data.source!r} holds pictures: {instead}, or give clips "
            "(x.mp4 with x.txt, or a csv beside mp4 files; metadata.jsonl and tar files are read for pictures only)"
        )


def load_family(config: Config, device: torch.device) -> Family:
    """Loads the model of a configuration; its encoders run in half precision only on a GPU.

    Raises:
        ConfigError: see `Family.of_config`.
    """
    half = device.type == "cuda" and config.model.precision != "fp32"
    return family_of(config.model).of_config(config, device, torch.float16 if half else torch.float32)
