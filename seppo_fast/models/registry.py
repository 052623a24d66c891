"""The registry of model families, keyed by the pipeline class that a model folder names."""

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
    """Registers a family under the names in its `pipelines`. A class decorator, also for families outside this package.

    The family is then used for every model folder whose `model_index.json` has one of these names as its `_class_name`.
    It is not used for hub ids.

    Raises:
        ValueError: `pipelines` is empty, or names a pipeline class of another family.
    """
    if not family.pipelines:
        raise ValueError(f"{family.__name__}.pipelines must name at least one pipeline class")
    for name in family.pipelines:
        if _FAMILIES.setdefault(name, family) is not family:
            raise ValueError(f"{family.__name__}.pipelines: {name!r} already belongs to {_FAMILIES[name].__name__}")
    return family


register(StableDiffusion)
register(AnimateDiff)


def family_of(model: ModelConfig) -> type[Family]:
    """Returns the family of the configured model, without reading any weights.

    The `model_index.json` of the model's folder decides. For a hub id, or a folder that cannot be read, this is
    `StableDiffusion`, whose loading reports what is wrong.
    """
    if model.motion_adapter:
        return AnimateDiff
    try:
        folder = shapes.SHIPPED.get(model.path) or Path(model.path).expanduser()
        return _FAMILIES.get(read_json(folder / "model_index.json")["_class_name"], StableDiffusion)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return StableDiffusion


def validate_model(config: Config) -> type[Family]:
    """Returns the family of the configured model after checking its settings, without reading any weights.

    Raises:
        ConfigError: The family does not support a setting. The message says which one and what to do.
    """
    model = config.model
    if model.path in shapes.SHIPPED and (model.path == "shapes-motion") != (model.motion_adapter == "shapes"):
        raise ConfigError(
            "the embedded model and adapter belong together: use model.path = shapes for pictures; model.path = "
            "shapes-motion with model.motion_adapter = shapes for clips"
        )
    family = family_of(model)
    family.validate(config)
    return family


def refuse_other_kind(config: Config, clips: bool) -> None:
    """Checks that a model of pictures is not used with data of clips, nor a model of clips with data of pictures.

    Args:
        config: the run's configuration.
        clips: whether the data holds clips.

    Raises:
        ConfigError: Model and data do not fit. The message says what to do.
    """
    makes_clips = family_of(config.model).makes_clips
    if clips and not makes_clips:
        raise ConfigError(
            f"data.source = {config.data.source!r} holds clips: set model.motion_adapter to the folder or hub id of a "
            "MotionAdapter that fits model.path (leave it empty only if model.path is an AnimateDiffPipeline folder)"
        )
    if makes_clips and not clips:
        adapter = config.model.motion_adapter
        what, instead = (
            (f"model.motion_adapter = {adapter!r}", "remove the adapter")
            if adapter
            else (f"model.path = {config.model.path!r}, an AnimateDiffPipeline,", "use a Stable Diffusion pipeline")
        )
        raise ConfigError(
            f"{what} makes clips, but data.source = {config.data.source!r} holds pictures: {instead}, or provide clips "
            "(x.mp4 with x.txt, or a csv beside mp4 files; metadata.jsonl and tar files are read for pictures only)"
        )


def load_family(config: Config, device: torch.device) -> Family:
    """Loads the configured model. The encoders run in half precision only on a GPU, and not if precision is fp32.

    Raises:
        ConfigError: See `Family.of_config`.
    """
    half = device.type == "cuda" and config.model.precision != "fp32"
    return family_of(config.model).of_config(config, device, torch.float16 if half else torch.float32)
