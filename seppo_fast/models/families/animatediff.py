"""AnimateDiff, which makes clips: Stable Diffusion 1.5 with motion modules between the layers of its UNet.

Shape legend: B clips, F frames, H x W pixels, C x h x w the latent of a frame, L tokens, D embedding width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn

from seppo_fast import shapes
from seppo_fast.config.schema import Config
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.models.encoders import PROMPT_EMBEDS
from seppo_fast.models.pipelines.folders import (
    check_complete,
    check_place,
    check_weights,
    expanded,
    load_as,
    variant_of,
)
from seppo_fast.models.pipelines.loading import check_pipeline, load_pipeline, rescheduled
from seppo_fast.models.temporal_attention import MOST_FRAMES
from seppo_fast.models.unet import UNetFamily
from seppo_fast.utils.errors import ConfigError

# The schedule that the motion modules were trained with. Neither an SD-1.5 folder nor an adapter records it.
_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "linspace",
}


class AnimateDiff(UNetFamily):
    """The family of AnimateDiff models. Conditioning has one row per clip; only `denoise` repeats it per frame.

    Args:
        pipe: the pipeline, whose UNet contains the motion modules.
        device: the device that everything is computed on.
        dtype: the dtype in which the encoders compute and the cache stores their outputs.
        frames: the number of frames per clip.
    """

    pipelines = ("AnimateDiffPipeline",)
    makes_clips = True
    has_comfyui_names = False  # ComfyUI has none for motion modules

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, dtype: torch.dtype, frames: int) -> None:
        super().__init__(pipe, device, dtype)
        self.frames: int = frames

    @classmethod
    def validate(cls, config: Config) -> None:
        """See `Family.validate`."""
        super().validate(config)
        if config.model.temporal_attention == "triton" and config.data.frames > MOST_FRAMES:
            raise ConfigError(
                f"model.temporal_attention = triton supports at most {MOST_FRAMES} frames, but data.frames = "
                f"{config.data.frames}"
            )

    @classmethod
    def of_config(cls, config: Config, device: torch.device, dtype: torch.dtype) -> AnimateDiff:
        """See `Family.of_config`."""
        model = config.model
        return cls.load(
            model.path,
            device,
            dtype,
            beta_schedule=model.beta_schedule,
            motion_adapter=model.motion_adapter,
            frames=config.data.frames,
        )

    @classmethod
    def load(
        cls,
        path: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        beta_schedule: str | None = None,
        motion_adapter: str = "",
        frames: int = 16,
    ) -> AnimateDiff:
        """Loads a Stable Diffusion 1.5 pipeline and a motion adapter, or a complete AnimateDiff pipeline.

        Args:
            path: a Stable Diffusion folder, a hub id or `shapes-motion`; without an adapter, the folder of an
                AnimateDiff pipeline, such as `save` writes.
            device: the device to compute on; each part moves there when it is first used.
            dtype: the dtype in which the encoders compute and the cache stores their outputs.
            beta_schedule: a noise schedule that overrides the default: AnimateDiff's linear one with an adapter, the
                pipeline's own without.
            motion_adapter: a folder or hub id of a `MotionAdapter`, or `shapes`, the one that ships with the package.
            frames: the number of frames per clip.

        Raises:
            ConfigError: As for `StableDiffusion.load`; the adapter does not fit the UNet; `frames` exceeds the number
                of frames that the motion modules support.
        """
        override = {} if beta_schedule is None else {"beta_schedule": beta_schedule}
        if motion_adapter:
            where = check_pipeline(path)
            adapter = _check_adapter(motion_adapter, _unet_config(path, where), frames)
            pipe = _assembled(load_pipeline(where), motion_adapter, adapter)
            pipe.scheduler = rescheduled(pipe.scheduler, DDIMScheduler, **_SCHEDULE | override)
        else:
            where = check_pipeline(path, ("AnimateDiffPipeline",))
            unet = load_as(
                "model.path", path, "a UNetMotionModel", lambda: _read_config(UNetMotionModel, where, "unet")
            )
            if unet["_class_name"] != "UNetMotionModel":
                raise ConfigError(
                    f"model.path = {path!r}: its unet is a {unet['_class_name']}, but an AnimateDiffPipeline needs a "
                    "UNetMotionModel"
                )
            _check_frames(frames, unet["motion_max_seq_length"])
            pipe = load_pipeline(where, AnimateDiffPipeline)
            # Folders that diffusers wrote contain the adapter as well. The UNet holds the same modules and is trained.
            pipe.register_modules(motion_adapter=None)
            if override:
                pipe.scheduler = rescheduled(pipe.scheduler, type(pipe.scheduler), **override)
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe, device, dtype, frames)

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Returns (C, F, h, w) for a clip with square frames; raises as `UNetFamily.picture_shape` does."""
        channels, *sides = self.picture_shape(resolution)
        return (channels, self.frames, *sides)

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the UNet's prediction `(B, C, F, h, w)` for latents of that shape at timesteps `(B,)`."""
        embeds = conditioning[PROMPT_EMBEDS].repeat_interleave(latents.shape[2], 0)
        return model(latents, times, encoder_hidden_states=embeds, return_dict=False)[0]

    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes uint8 clips `(B, F, H, W, 3)` to scaled latents `(B, C, F, h, w)`."""
        return self.vae.encode_clips(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decodes scaled latents `(B, C, F, h, w)` to uint8 clips `(B, F, H, W, 3)`."""
        return self.vae.decode_clips(latents)

    def assembled(self, parts: dict[str, Any]) -> AnimateDiffPipeline:
        """Returns an `AnimateDiffPipeline` assembled from these parts, whatever the class of the loaded pipeline."""
        return AnimateDiffPipeline(**parts)


def _assembled(pipe: DiffusionPipeline, path: str, where: str) -> AnimateDiffPipeline:
    """Returns a float32 AnimateDiff pipeline that combines the parts of `pipe` and the adapter at `where`."""

    def load() -> UNetMotionModel:
        adapter = MotionAdapter.from_pretrained(where, use_safetensors=True, variant=variant_of(Path(where)))
        check_complete("model.motion_adapter", Path(where), adapter)
        return UNetMotionModel.from_unet2d(pipe.unet, adapter.float())

    unet = load_as("model.motion_adapter", path, "a MotionAdapter", load)
    kept = ("vae", "text_encoder", "tokenizer", "scheduler")
    # The UNet now contains the motion modules; keeping the adapter would mean a second copy of them.
    return AnimateDiffPipeline(**{name: pipe.components[name] for name in kept}, unet=unet, motion_adapter=None)


def _check_adapter(path: str, unet: Mapping[str, Any], frames: int) -> str:
    """Checks `model.motion_adapter` before any weights are read.

    Returns:
        The adapter's folder or hub id.

    Raises:
        ConfigError: See `AnimateDiff.load`.
    """
    where = str(shapes.MOTION_ADAPTER) if path == "shapes" else expanded(path)
    folder = check_place("model.motion_adapter", where, "MotionAdapter")
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model.motion_adapter = {path!r} has no config.json, so it is not a MotionAdapter")
        check_weights("model.motion_adapter", path, folder, loader="MotionAdapter")
    adapter = load_as("model.motion_adapter", path, "a MotionAdapter", lambda: _read_config(MotionAdapter, where))
    if adapter["_class_name"] != "MotionAdapter":
        raise ConfigError(f"model.motion_adapter = {path!r} is a {adapter['_class_name']}; a MotionAdapter is needed")
    _check_fit(path, adapter, unet)
    _check_frames(frames, adapter["motion_max_seq_length"])
    return where


def _check_fit(path: str, adapter: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raises ConfigError if the adapter was made for another UNet."""
    if adapter["conv_in_channels"]:
        raise ConfigError(
            f"model.motion_adapter = {path!r} changes the UNet's input (PIA); an adapter that does not is needed"
        )
    levels = len(unet["block_out_channels"])
    for ours, theirs in {
        "block_out_channels": "block_out_channels",
        "motion_layers_per_block": "layers_per_block",
        "motion_norm_num_groups": "norm_num_groups",
    }.items():
        if _by_level(adapter[ours], levels) != _by_level(unet[theirs], levels):
            raise ConfigError(
                f"model.motion_adapter = {path!r} does not fit model.path: its {ours} is {adapter[ours]}, "
                f"the UNet's {theirs} is {unet[theirs]}"
            )


def _by_level(value: Any, levels: int) -> list[Any]:
    return [value] * levels if isinstance(value, int) else list(value)


def _check_frames(frames: int, most: int) -> None:
    if frames > most:
        raise ConfigError(f"data.frames = {frames}: this motion adapter supports at most {most} frames")


def _unet_config(path: str, where: str) -> dict[str, Any]:
    """Returns the configuration of an SD-1.5 UNet.

    Raises:
        ConfigError: The UNet uses a setting that `UNetMotionModel` lacks and would silently drop.
    """
    config = load_as("model.path", path, "a UNet", lambda: _read_config(UNet2DConditionModel, where, "unet"))
    plain, kept = _defaults(UNet2DConditionModel), {*_defaults(UNetMotionModel), "attention_head_dim"}
    for name in plain.keys() - kept:
        if (config[name] or None) != (plain[name] or None):
            raise ConfigError(
                f"model.path = {path!r}: its UNet has {name} = {config[name]!r}, which AnimateDiff does not support"
            )
    return config


def _read_config(kind: type[ConfigMixin], where: str, subfolder: str | None = None) -> dict[str, Any]:
    """Returns a model's saved configuration, with lists as tuples and defaults for keys that are missing."""
    written = kind.load_config(where, **({} if subfolder is None else {"subfolder": subfolder}))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}
    return {"_class_name": None, **_defaults(kind), **values}


def _defaults(kind: type[ConfigMixin]) -> dict[str, Any]:
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}
