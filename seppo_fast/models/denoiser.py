"""The one forward of policy and references, in training and in sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.models.family import Family


class Denoiser:
    """Calls a family's network in the compute dtype.

    Args:
        family: how the network is called.
        dtype: the compute dtype; float32 runs without autocast.
    """

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        self.device = family.device
        self._family = family
        self._dtype = dtype

    def autocast(self) -> torch.autocast:
        """Returns the mode that every forward runs in."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the model's prediction `(B, *latent)`; its dtype is the compute dtype."""
        with self.autocast():
            return self._family.denoise(model, latents, times, conditioning)

    def sample(
        self, model: nn.Module, sampler: Sampler, noise: Tensor, conditioning: Conditioning, uncond: Conditioning
    ) -> Tensor:
        """Guided samples `(B, *latent)` float32 on the CPU, `sampler.config.batch` (all where it is None) at a time.

        Args:
            model: the reference, or any network of the family.
            sampler: solver and guidance.
            noise: `(B, *latent)` float32.
            conditioning: B rows, of the pairs' own prompts, never the dropped one.
            uncond: one row, of the empty prompt.
        """
        size, device = sampler.config.batch or len(noise), self.device

        def denoise(latents: Tensor, times: Tensor, rows: Conditioning) -> Tensor:
            return self.denoise(model, latents, times, rows)

        batches = zip(noise.split(size), conditioning.split(size), strict=True)
        with self.autocast():  # around all steps, so that weights are cast once and not at each
            return torch.cat(
                [sampler(denoise, x.to(device), rows.to(device), uncond.to(device)).cpu() for x, rows in batches]
            )
