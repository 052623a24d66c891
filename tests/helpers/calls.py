"""Calls bare UNets as a model family would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import DiffusionSolver, Sampler
from seppo_fast.models.encoders import PROMPT_EMBEDS
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.models.family import Family

denoise_unet: Any = partial(StableDiffusion.denoise, None)
"""`Family.denoise` for a UNet on pictures, without a loaded pipeline."""


def embeds(tensor: Tensor) -> Conditioning:
    """Wraps text embeddings `(B, L, D)` as the conditioning that a model gets."""
    return Conditioning({PROMPT_EMBEDS: tensor})


def inputs_of(latent: Sequence[int], prompt: Sequence[int]) -> Callable[[int], tuple[Tensor, Tensor, Conditioning]]:
    """Returns a function like `Family.example_inputs`, for these shapes."""

    def inputs(rows: int) -> tuple[Tensor, Tensor, Conditioning]:
        return torch.zeros(rows, *latent), torch.zeros(rows, dtype=torch.int64), embeds(torch.zeros(rows, *prompt))

    return inputs


def call_of(latent: Sequence[int], prompt: Sequence[int]) -> Callable[[nn.Module, int], Tensor]:
    """Returns a function that runs a UNet on any number of rows of these shapes."""
    inputs = inputs_of(latent, prompt)
    return lambda model, rows: denoise_unet(model, *inputs(rows))


def sampler_of(scheduler_config: Mapping[str, Any], config: SamplerConfig) -> Sampler:
    """Returns a sampler that uses diffusers' solvers with the settings of a scheduler."""
    DiffusionSolver(scheduler_config, config)
    return Sampler(config, lambda shape: DiffusionSolver(scheduler_config, config))


def encoded(family: Family, prompts: Sequence[str]) -> Conditioning:
    """Returns the conditioning of prompts, one row per prompt."""
    return family.collate(family.encode_prompts(list(prompts)))
