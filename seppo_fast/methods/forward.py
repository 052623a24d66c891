"""The one forward of policy and reference.

Shape legend: B rows, b pairs of a micro-batch, L tokens, D embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.methods.pairs import Pairs
from seppo_fast.models.families.sd15 import StableDiffusion


class Noised(NamedTuple):
    """What the model is shown of b pairs, winner half first, and what it should predict.

    Attributes:
        latents: `(2b, *latent)`, or `(b, *latent)` without losers.
        timesteps: one a row.
        prompt_embeds: one a row, `(L, D)` each.
        target: as `latents`, or `(b, *latent)` where both halves share it: epsilon-prediction with shared noise.
    """

    latents: Tensor
    timesteps: Tensor
    prompt_embeds: Tensor
    target: Tensor


class Forward:
    """Noise the pairs, predict, and say what should have been predicted; the same code for policy and reference.

    Args:
        family: how the model is called.
        schedule: noising and target.
        dtype: of the computation; float32 runs without autocast.
    """

    def __init__(self, family: StableDiffusion, schedule: NoiseSchedule, dtype: torch.dtype) -> None:
        self.device = family.device
        self._family = family
        self._schedule = schedule
        self._dtype = dtype

    def autocast(self) -> torch.autocast:
        """The compute dtype of every forward, sampling included."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def denoise(self, model: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The model's prediction under autocast; its dtype is the compute dtype."""
        with self.autocast():
            return self._family.denoise(model, latents, timesteps, prompt_embeds)

    def noised(self, pairs: Pairs) -> Noised:
        """Pairs to the model's input and target, on the device; DDPM eq. 4."""
        pairs = pairs.to(self.device)
        latents = pairs.winners if pairs.losers is None else torch.cat([pairs.winners, pairs.losers])
        halves = len(latents) // len(pairs)
        noise = pairs.noise.repeat(len(latents) // len(pairs.noise), *[1] * (latents.dim() - 1))
        timesteps = pairs.timesteps.repeat(halves)
        shared = self._schedule.prediction_type == "epsilon"
        return Noised(
            latents=self._schedule.add_noise(latents, noise, timesteps),
            timesteps=timesteps,
            prompt_embeds=pairs.prompt_embeds.repeat(halves, 1, 1),
            target=pairs.noise if shared else self._schedule.target(latents, noise, timesteps),
        )

    def __call__(self, model: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Prediction `(2b, *latent)` (`(b, *latent)` without losers) and target; see `Noised`."""
        noised = self.noised(pairs)
        prediction = self.denoise(model, noised.latents, noised.timesteps, noised.prompt_embeds)
        return prediction, noised.target
