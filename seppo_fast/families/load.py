"""Which family a configuration asks for."""

from __future__ import annotations

import torch

from seppo_fast.config import Config
from seppo_fast.families.sd import StableDiffusion


def load_family(config: Config, device: torch.device) -> StableDiffusion:
    """The model of a configuration; its encoders run in half precision only on a GPU."""
    half = device.type == "cuda" and config.model.precision != "fp32"
    return StableDiffusion.load(config.model.path, device, torch.float16 if half else torch.float32)
