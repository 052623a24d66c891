"""Loading of a Stable Diffusion 1.5 or AnimateDiff pipeline from a folder or hub id, with errors that say why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.schedulers import SchedulerMixin
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from seppo_fast import shapes
from seppo_fast.diffusion.schedule import check_diffusion
from seppo_fast.models.pipelines.folders import (
    UNNEEDED,
    check_complete,
    check_parts,
    check_place,
    check_weights,
    expanded,
    load_as,
    refuse_missing,
    variant_of,
)
from seppo_fast.utils.errors import ConfigError

# Both pipeline classes have the same parts.
SD15_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_WEIGHTS = ("unet", "vae", "text_encoder")
_AS_SAFETENSORS: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}


def check_pipeline(path: str, allowed: Sequence[str] = SD15_PIPELINES) -> str:
    """Checks `model.path` before any weights are read.

    Args:
        path: the value of `model.path`: a diffusers folder, a hub id, or the name of an embedded pipeline.
        allowed: the accepted pipeline classes; messages name the first one.

    Returns:
        The folder or hub id.

    Raises:
        ConfigError: See `StableDiffusion.load`.
    """
    if not path:
        raise ConfigError("model.path is empty; set it to a diffusers folder, a hub id, or 'shapes'")
    where = str(shapes.SHIPPED[path]) if path in shapes.SHIPPED else expanded(path)
    folder = check_place("model.path", where, "StableDiffusionPipeline")
    if folder is not None:
        if not (folder / "model_index.json").is_file():
            raise ConfigError(
                f"model.path = {where!r} has no model_index.json, so it is not a diffusers pipeline folder"
            )
        for part in _WEIGHTS:
            check_weights("model.path", where, shapes.part_folder(folder, part).parent, part)

    def read() -> dict[str, Any]:
        return dict(StableDiffusionPipeline.load_config(where))

    index = load_as("model.path", where, "a Stable Diffusion pipeline", read)
    found = str(index.get("_class_name"))
    if found == "AnimateDiffPipeline" and found not in allowed:
        local = "" if folder else " and set model.path to a local folder instead of a hub id"
        raise ConfigError(
            f"model.path = {path!r} is an AnimateDiffPipeline, which already has motion modules: leave "
            f"model.motion_adapter empty{local}; or use a Stable Diffusion pipeline and an adapter"
        )
    if found not in allowed:
        raise ConfigError(
            f"model.path = {path!r} could not be loaded as a Stable Diffusion pipeline: it is a {found}, the SD-1.5 "
            f"format ({allowed[0]}) is needed"
        )
    check_parts("model.path", where, index)
    return where


def load_pipeline(where: str, kind: type[DiffusionPipeline] = StableDiffusionPipeline) -> DiffusionPipeline:
    """Loads the pipeline at `where` (see `check_pipeline`) in float32, without the parts that training never uses.

    Raises:
        ConfigError: Weights are missing, damaged or not safetensors, or the scheduler or the UNet is unsupported.
    """
    unneeded: dict[str, Any] = dict.fromkeys(UNNEEDED)
    if kind is StableDiffusionPipeline:
        unneeded["requires_safety_checker"] = False
    else:
        del unneeded["safety_checker"]  # AnimateDiff pipelines have none

    def load() -> DiffusionPipeline:
        scheduler = _stand_in(where)
        parts = unneeded | _shared(where) | _variants(where, kind) | {"text_encoder": _text_encoder(where)}
        parts |= {} if scheduler is None else {"scheduler": None}
        try:
            pipe = kind.from_pretrained(where, **_AS_SAFETENSORS, **parts)
        except (OSError, ValueError):
            if Path(where).is_dir():
                raise
            pipe = kind.from_pretrained(where, **_AS_SAFETENSORS, variant="fp16", **parts)  # all that some hub ids have
        if scheduler is not None:
            pipe.register_modules(scheduler=scheduler)
        check_diffusion(pipe.scheduler)
        # Some folders do not set the tokenizer's limit, in which case it is 10^30.
        limits = pipe.tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings
        pipe.tokenizer.model_max_length = min(limits)
        for part in _WEIGHTS:
            check_complete("model.path", shapes.part_folder(where, part), pipe.components[part])
        return pipe

    pipe = load_as("model.path", where, "a Stable Diffusion pipeline", load)
    pipe.set_progress_bar_config(disable=True)
    takes, gives, made = pipe.unet.config.in_channels, pipe.unet.config.out_channels, pipe.vae.config.latent_channels
    if not takes == gives == made:
        raise ConfigError(
            f"model.path = {where!r}: its UNet has {takes} input and {gives} output channels, and the latents of its "
            f"VAE have {made}; a text-to-image model is needed (inpainting models have more input channels)"
        )
    return pipe


def _shared(where: str) -> dict[str, Any]:
    """Loads the parts that an embedded pipeline shares with another one and does not store itself."""
    vae, tokenizer = shapes.part_folder(where, "vae"), shapes.part_folder(where, "tokenizer")
    if vae.parent == Path(where):
        return {}
    return {
        "vae": AutoencoderKL.from_pretrained(vae, **_AS_SAFETENSORS),
        "tokenizer": CLIPTokenizer.from_pretrained(tokenizer),
    }


def _variants(where: str, kind: type[DiffusionPipeline]) -> dict[str, nn.Module]:
    """Loads, in float32, those of UNet and VAE of which the folder has only a variant such as fp16."""
    kinds = {"unet": UNet2DConditionModel if kind is StableDiffusionPipeline else UNetMotionModel, "vae": AutoencoderKL}
    variants = {part: variant_of(Path(where) / part) for part in kinds}
    return {
        part: kinds[part].from_pretrained(where, subfolder=part, variant=variant, **_AS_SAFETENSORS)
        for part, variant in variants.items()
        if variant is not None
    }


def _text_encoder(where: str) -> CLIPTextModel:
    """Loads the text encoder at `where` in float32.

    It is loaded separately because transformers fills missing weights with random numbers and says so only in its
    loading report. Names do change between versions: transformers up to 5.5 does not know the names that 5.6 gives a
    CLIPTextModel.

    Raises:
        ConfigError: A weight is missing.
    """
    place = Path(where) / "text_encoder"

    def load(variant: str | None) -> Any:
        settings = {"subfolder": "text_encoder", "output_loading_info": True, **_AS_SAFETENSORS}
        return CLIPTextModel.from_pretrained(where, variant=variant, **settings)

    try:
        encoder, report = load(variant_of(place))
    except OSError as problem:
        if Path(where).is_dir():
            raise
        try:
            encoder, report = load("fp16")  # as in `load_pipeline`
        except OSError:
            raise problem from None
    refuse_missing("model.path", place, CLIPTextModel, report["missing_keys"])
    return encoder


def _stand_in(where: str) -> SchedulerMixin | None:
    """Returns a DDIM scheduler to replace one that needs a missing package; None if none is missing.

    This loses nothing, since only a scheduler's settings are used.
    """
    index = StableDiffusionPipeline.load_config(where)
    try:
        _ = getattr(diffusers, str(index["scheduler"][1])).config_name  # diffusers' dummy class raises ImportError here
    except ImportError:
        return DDIMScheduler.from_pretrained(where, subfolder="scheduler")
    except (AttributeError, LookupError, TypeError):
        pass  # loading the pipeline reports what is wrong
    return None


def rescheduled(scheduler: SchedulerMixin, kind: type[SchedulerMixin], **settings: Any) -> SchedulerMixin:
    """Returns a scheduler of class `kind` with another one's configuration, changed by `settings`.

    Explicit betas (`trained_betas`) are dropped, since they would override the settings.
    """
    return kind.from_config(scheduler.config, trained_betas=None, **settings)
