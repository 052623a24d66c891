"""The forward that policy and references share, in training and in sampling, and the round trip through pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.data.cache.build import encoded_at_once
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Denoise, Sampler, guided, with_uncond
from seppo_fast.diffusion.trajectories import TrajectorySampler
from seppo_fast.models.family import Family
from seppo_fast.utils.errors import NonFiniteError


class Denoiser:
    """Runs networks of a family in the compute dtype.

    Args:
        family: the model family, which knows how to call its network.
        dtype: the compute dtype; float32 runs without autocast.
    """

    def __init__(self, family: Family, dtype: torch.dtype) -> None:
        self.device = family.device
        self._family = family
        self._dtype = dtype

    def autocast(self) -> torch.autocast:
        """Returns the autocast context that every forward runs in."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32)

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the model's prediction `(B, *latent)` in the compute dtype; see `Family.denoise`."""
        with self.autocast():
            return self._family.denoise(model, latents, times, conditioning)

    def guided(
        self,
        model: nn.Module,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning,
        scale: float,
    ) -> Tensor:
        """Returns the guided prediction `(B, *latent)` float32, which passes its gradient on to both of its parts.

        Args:
            model: the network.
            latents: `(B, *latent)` on the device.
            times: `(B,)`.
            conditioning: B rows.
            uncond: one row, for the empty prompt; ignored at a scale of 1, which needs half as many rows.
            scale: the guidance scale.
        """
        both = with_uncond(conditioning, uncond, scale)
        return guided(partial(self.denoise, model), latents, times, both, self._family.guide, scale)

    def trajectories(
        self,
        model: nn.Module,
        sampler: TrajectorySampler,
        noise: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning,
        step_noise: Callable[[int], Tensor],
    ) -> Tensor:
        """Generates trajectories `(B, S + 1, *latent)`, all B at once; see `TrajectorySampler`."""
        denoise: Denoise = partial(self.denoise, model)
        device = self.device
        with self.autocast():  # see `sample`
            return sampler(denoise, noise.to(device), conditioning.to(device), uncond.to(device), step_noise)

    def sample(
        self,
        model: nn.Module,
        sampler: Sampler,
        noise: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning,
    ) -> Tensor:
        """Generates guided samples in batches of `sampler.config.batch` (all at once if it is None).

        Args:
            model: the network to sample from: the reference, or any other network of the family.
            sampler: the solver and guidance to use.
            noise: the initial noise: `(B, *latent)` float32.
            conditioning: B rows, one per sample; of the pair's own prompt even where training drops it.
            uncond: one row, for the empty prompt.

        Returns:
            The samples: `(B, *latent)` float32 on the CPU.
        """
        size, device = sampler.config.batch or len(noise), self.device

        def denoise(latents: Tensor, times: Tensor, rows: Conditioning) -> Tensor:
            return self.denoise(model, latents, times, rows)

        batches = zip(noise.split(size), conditioning.split(size), strict=True)
        with self.autocast():  # around all steps, so that autocast's cache casts each weight once, not once per step
            return torch.cat(
                [sampler(denoise, x.to(device), rows.to(device), uncond.to(device)).cpu() for x, rows in batches]
            )

    @torch.no_grad()
    def through_pixels(self, latents: Tensor) -> Tensor:
        """Decodes samples to pixels and encodes them again, as if they were pictures or clips of the data set.

        Samples are decoded to 8 bits and encoded by the family's own functions, in batches of the size that filling the
        cache uses, since rounding depends on the batch size. The encoders are parked afterwards, even after an error
        such as running out of memory.

        Args:
            latents: samples `(B, *latent)`.

        Returns:
            The latents `(B, *latent)`, float32 on the CPU, that the data cache would hold for these pictures.

        Raises:
            NonFiniteError: Samples, or the latents of their pictures, are not finite.
        """
        made = []
        try:
            for batch in latents.split(encoded_at_once(self._family.frames)):
                # The memory layout of decoded picture files; the rounding of convolutions depends on the layout.
                pictures = np.array(self._family.decode(batch), order="C")
                made.append(self._family.encode_images(torch.from_numpy(pictures)).float().cpu())
        finally:
            self._family.park_encoders()
        encoded = torch.cat(made)
        assert encoded.shape == latents.shape, "encode_images must return latents of the shape that decode accepts"
        # A non-finite sample still decodes to valid 8-bit pixels, so the samples themselves are checked as well.
        if not (torch.isfinite(latents).all() and torch.isfinite(encoded).all()):
            raise NonFiniteError(
                "sampler.round_trip: samples or the latents of their pictures are not finite. Set model.precision to "
                "fp32 or use another VAE."
            )
        return encoded
