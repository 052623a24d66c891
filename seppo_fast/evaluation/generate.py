"""Generates pictures or clips from fixed prompts and fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.evaluation.grids import side_by_side
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.utils.progress import progress
from seppo_fast.utils.random import keyed_noise


def generate(
    family: Family,
    denoiser: Denoiser,
    model: nn.Module,
    sampler: Sampler,
    prompts: Sequence[str],
    *,
    resolution: int,
    seed: int,
) -> np.ndarray:
    """Generates one picture or clip per prompt.

    Picture i depends only on the model, the sampler, prompt i, the seed and i. Two models called with the same prompts
    and seed start from the same noise, so their scores can be compared in pairs.

    Args:
        family: the model family; its encoders are parked on the CPU afterwards.
        denoiser: runs the network.
        model: the network to sample from.
        sampler: the solver and guidance to use.
        prompts: one per picture.
        resolution: the side of a picture in pixels.
        seed: seed of the starting noise.

    Returns:
        Pictures `(len(prompts), H, W, 3)` uint8, or clips `(len(prompts), F, H, W, 3)` if the family makes clips.
    """
    shape = family.latent_shape(resolution)
    noise = keyed_noise(seed, "evaluation", [(0, index) for index in range(len(prompts))], shape)
    rows = [row for chunk in _chunks(prompts, 256) for row in family.encode_prompts(list(chunk))]
    conditioning = family.collate([*family.encode_prompts([""]), *rows])
    own, uncond = conditioning.take(slice(1, None)), conditioning.take(slice(0, 1))
    with progress(len(prompts), "generated", "clips" if family.makes_clips else "pictures") as advance:
        latents = denoiser.sample(model, sampler, noise, own, uncond, sampled=advance)
    pictures = family.decode(latents)
    family.park_encoders()
    return pictures


class FixedPrompts:
    """Draws a model beside its base during training, always from the same prompts and seed.

    Args:
        family: the model family.
        denoiser: runs the network.
        model: the network; its weights at construction are the base. If it is sharded, all processes must construct
            this object and call `write`.
        sampler: the solver and guidance to use.
        prompts: one per row of the picture.
        resolution: the side of a picture in pixels.
        seed: seed of the starting noise.
    """

    def __init__(
        self,
        family: Family,
        denoiser: Denoiser,
        model: nn.Module,
        sampler: Sampler,
        prompts: Sequence[str],
        resolution: int,
        seed: int = 0,
    ) -> None:
        self._prompts = list(prompts)
        self.generate = partial(
            generate, family, denoiser, model, sampler, self._prompts, resolution=resolution, seed=seed
        )
        self.base = self.generate()

    def write(self, file: Path | None, name: str) -> None:
        """Writes a PNG with the base beside the current model, titled `name`; with `file` None it only generates."""
        pictures = self.generate()
        if file is not None:
            side_by_side(self._prompts, {"base": self.base, name: pictures}).save(file)


def _chunks(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
