"""Pictures at fixed prompts and fixed seeds."""

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
    """Pictures `(len(prompts), H, W, 3)` uint8, or clips `(len(prompts), F, H, W, 3)`, as the family makes them.

    Picture i depends on the model, prompt i, seed and i alone.

    Two models called with the same prompts and seed start from the same noise: their scores are paired.
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
    """The same prompts and seeds again and again: base beside current.

    Args:
        family: the model.
        denoiser: how it is called.
        model: its network, which as it is now is the base; for all processes to call where it is sharded.
        sampler: how pictures are made.
        prompts: one row each.
        resolution: in pixels.
        seed: of the starting noise.
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
        """Writes a PNG of base beside the model as it is now, under the title `name`; None: only generates."""
        pictures = self.generate()
        if file is not None:
            side_by_side(self._prompts, {"base": self.base, name: pictures}).save(file)


def _chunks(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
