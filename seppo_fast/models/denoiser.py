"""The one forward of policy and references, in training and in sampling, and what is done with samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.data.cache.build import encoded_at_once
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.models.family import Family
from seppo_fast.utils.errors import NonFiniteError


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
        self,
        model: nn.Module,
        sampler: Sampler,
        noise: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning,
        *,
        sampled: Callable[[int], object] = lambda rows: None,
    ) -> Tensor:
        """Guided samples `(B, *latent)` float32 on the CPU, `sampler.config.batch` (all where it is None) at a time.

        Args:
            model: the reference, or any network of the family.
            sampler: solver and guidance.
            noise: `(B, *latent)` float32.
            conditioning: B rows, of the pairs' own prompts, never the dropped one.
            uncond: one row, of the empty prompt.
            sampled: called after each batch with its number of rows.
        """
        size, device = sampler.config.batch or len(noise), self.device

        def denoise(latents: Tensor, times: Tensor, rows: Conditioning) -> Tensor:
            return self.denoise(model, latents, times, rows)

        made = []
        with self.autocast():  # around all steps, so that weights are cast once and not at each
            for x, rows in zip(noise.split(size), conditioning.split(size), strict=True):
                made.append(sampler(denoise, x.to(device), rows.to(device), uncond.to(device)).cpu())
                sampled(len(x))
            return torch.cat(made)

    @torch.no_grad()
    def through_pixels(self, latents: Tensor) -> Tensor:
        """Returns latents `(B, *latent)` float32 on the CPU: what the data cache would hold of the samples' pictures.

        Samples are decoded to 8-bit pictures or clips and encoded, by the family's own functions and in the cache's
        batches, since rounding depends on a batch's size. The encoders are parked again, also where memory is short.

        Args:
            latents: samples `(B, *latent)`.

        Raises:
            NonFiniteError: samples or their encoded pictures are not finite.
        """
        made = []
        try:
            for batch in latents.split(encoded_at_once(self._family.frames)):
                # In the layout that decoded files have: convolutions round by it.
                pictures = np.array(self._family.decode(batch), order="C")
                made.append(self._family.encode_images(torch.from_numpy(pictures)).float().cpu())
        finally:
            self._family.park_encoders()
        encoded = torch.cat(made)
        assert encoded.shape == latents.shape, "encode_images must give pictures the shape that decode takes"
        # In 8 bits a sample that is not finite looks like any other.
        if not (torch.isfinite(latents).all() and torch.isfinite(encoded).all()):
            raise NonFiniteError(
                "sampler.round_trip: samples or their encoded pictures are not finite. Set model.precision to fp32 or "
                "use another VAE."
            )
        return encoded
