"""Generates pictures or clips from fixed prompts and fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from torch import nn

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.evaluation.grids import side_by_side
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.utils.progress import progress
from seppo_fast.utils.random import keyed_noise

_ENCODED = 256  # prompts that are encoded at once


class PromptBatches:
    """Generates pictures or clips for a list of prompts, one batch at a time.

    Which prompts share a batch, in the text encoder, the network and the decoder, depends only on the list and on
    `sampler.config.batch`: rounding depends on the batch, so a picture is the same bit for bit whichever of the other
    batches were generated before it, or by which process.

    Args:
        family: the model family.
        denoiser: runs the network.
        model: the network to sample from.
        sampler: the solver and guidance to use; its batch size is None for a single batch.
        prompts: the N prompts.
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
        *,
        resolution: int,
        seed: int,
    ) -> None:
        self._family, self._denoiser, self._model, self._sampler = family, denoiser, model, sampler
        self._prompts, self._seed = list(prompts), seed
        self._shape = family.latent_shape(resolution)
        self._uncond = family.encode_prompts([""])[0]
        self._encoded = lru_cache(maxsize=2)(self._encode)  # a batch lies in at most two chunks if it is not larger

    @property
    def batch(self) -> int:
        """The number of prompts in a batch; the last one may be smaller."""
        return self._sampler.config.batch or len(self._prompts)

    def batches(self) -> list[range]:
        """Returns the places in the list of prompts of each batch."""
        size = self.batch
        return [range(start, min(start + size, len(self._prompts))) for start in range(0, len(self._prompts), size)]

    def generate(self, places: Sequence[int], sample: int = 0) -> np.ndarray:
        """Generates one of `batches`.

        Args:
            places: the batch's places in the list of prompts.
            sample: which sample of each prompt; the noise of place i depends on (seed, sample, i) alone.

        Returns:
            Pictures `(len(places), H, W, 3)` uint8, or clips `(len(places), F, H, W, 3)`.
        """
        noise = keyed_noise(self._seed, "evaluation", [(sample, place) for place in places], self._shape)
        rows = [self._encoded(place // _ENCODED)[place % _ENCODED] for place in places]
        conditioning = self._family.collate([self._uncond, *rows])
        own, uncond = conditioning.take(slice(1, None)), conditioning.take(slice(0, 1))
        return self._family.decode(self._denoiser.sample(self._model, self._sampler, noise, own, uncond))

    def _encode(self, chunk: int) -> list[Conditioning]:
        return self._family.encode_prompts(self._prompts[chunk * _ENCODED : (chunk + 1) * _ENCODED])


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
    made = PromptBatches(family, denoiser, model, sampler, prompts, resolution=resolution, seed=seed)
    pictures = []
    with progress(len(prompts), "generated", "clips" if family.makes_clips else "pictures") as advance:
        for places in made.batches():
            pictures.append(made.generate(places))
            advance(len(places))
    family.park_encoders()
    return np.concatenate(pictures)


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
