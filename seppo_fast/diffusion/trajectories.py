"""Random guided sampling that keeps every latent on the way: the trajectories on which policy gradients train.

Shape legend: B samples, S steps, * the shape of a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Denoise, Guide, guided, with_uncond
from seppo_fast.diffusion.steps import Step


@dataclass(frozen=True)
class TrajectorySampler:
    """Samples with the steps of a reverse process.

    Attributes:
        steps: the steps, from noise to data.
        guide: a function that combines the conditional and the unconditional prediction.
        scale: the guidance scale; 1: no guidance.
    """

    steps: tuple[Step, ...]
    guide: Guide
    scale: float

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        conditioning: Conditioning,
        uncond: Conditioning,
        step_noise: Callable[[int], Tensor],
    ) -> Tensor:
        """Samples trajectories.

        Args:
            denoise: a function that runs the model.
            noise: the initial noise: `(B, *latent)` float32, on the model's device.
            conditioning: B rows, one per sample.
            uncond: one row, for the empty prompt; ignored if guidance is 1.
            step_noise: returns the noise of a step, `(B, *latent)` float32 on the CPU, given its index from 0; not
                called for deterministic steps.

        Returns:
            `(B, S + 1, *latent)` float32 on the CPU: the noise, and the latents after each step. They stay in float32:
            rounding them to float16 would change log-probabilities by as much as the clip ranges.
        """
        latents, kept = noise, [noise.cpu()]
        both = with_uncond(conditioning, uncond, self.scale)
        for index, step in enumerate(self.steps):
            times = torch.full((len(noise),), step.timestep, device=noise.device)
            prediction = guided(denoise, latents, times, both, self.guide, self.scale)
            latents = step.mean(latents, prediction)
            if step.sigma:
                latents = latents + step.sigma * step_noise(index).to(noise.device)
            kept.append(latents.cpu())
        return torch.stack(kept, dim=1)
