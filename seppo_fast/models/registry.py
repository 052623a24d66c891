"""Which family a configuration asks for."""

from __future__ import annotations

import torch

from seppo_fast.config.contradictions import makes_clips
from seppo_fast.config.schema import Config
from seppo_fast.models.families.animatediff import AnimateDiff
from seppo_fast.models.families.sd15 import StableDiffusion


def load_family(config: Config, device: torch.device) -> StableDiffusion:
    """The model of a configuration; its encoders run in half precision only on a GPU."""
    half = device.type == "cuda" and config.model.precision != "fp32"
    model, dtype = config.model, torch.float16 if half else torch.float32
    if not makes_clips(model):
        return StableDiffusion.load(model.path, device, dtype, beta_schedule=model.beta_schedule)
    return AnimateDiff.load(
        model.path,
        device,
        dtype,
        beta_schedule=model.beta_schedule,
        motion_adapter=model.motion_adapter,
        frames=config.data.frames,
    )
