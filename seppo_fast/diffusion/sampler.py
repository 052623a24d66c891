"""Guided sampling in latent space.

Shape legend: B rows, * the shape of a latent, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.utils.errors import ConfigError

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, *latent), timesteps (B,) int64, prompt_embeds (B, L, D)) -> prediction (B, *latent)"""


@dataclass(frozen=True)
class Sampler:
    """Deterministic guided sampling in latent space.

    The solver is diffusers' own, configured by the pipeline's scheduler (spacing, offset, prediction type) as
    `Scheduler.from_config(pipe.scheduler.config)` does, so that samples equal the pipeline's at the same noise.

    Attributes:
        scheduler_config: configuration of the pipeline's scheduler.
        config: solver, number of steps and guidance scale.
    """

    scheduler_config: Mapping[str, Any]
    config: SamplerConfig

    def __post_init__(self) -> None:
        """Raises ConfigError for more steps than the schedule has timesteps, or a schedule that cannot be sampled."""
        solver = self._solver()
        timesteps = solver.config.num_train_timesteps
        if self.config.steps > timesteps:
            raise ConfigError(
                f"sampler.steps = {self.config.steps}: this model's schedule has {timesteps} timesteps, not more"
            )
        try:
            solver.set_timesteps(self.config.steps)
            first, last = int(solver.timesteps.min()), int(solver.timesteps.max())
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as problem:
            raise ConfigError(f"model.path: its scheduler cannot be used: {problem}") from problem
        if not 0 <= first <= last <= timesteps:
            raise ConfigError(
                f"model.path: its scheduler has {timesteps} timesteps, and would sample {first} to {last}"
            )

    @torch.no_grad()
    def __call__(self, denoise: Denoise, noise: Tensor, prompt_embeds: Tensor, uncond_embeds: Tensor) -> Tensor:
        """Samples x_0 from x_T.

        Args:
            denoise: the model.
            noise: x_T `(B, *latent)` float32, on the device of the model.
            prompt_embeds: `(B, L, D)`.
            uncond_embeds: `(1, L, D)`, of the empty prompt; not read where guidance is 1.

        Returns:
            Scaled latents `(B, *latent)` float32.
        """
        solver = self._solver()
        # Its timesteps stay on the CPU: there they index the schedule without a wait for the device, and the
        # coefficients go into the kernels as numbers. The UNet reads a copy that is sent once.
        solver.set_timesteps(self.config.steps)
        on_device = solver.timesteps.to(noise.device)
        guided = self.config.guidance > 1
        embeds = torch.cat([uncond_embeds.expand_as(prompt_embeds), prompt_embeds]) if guided else prompt_embeds
        latents = noise * solver.init_noise_sigma
        for step, timestep in enumerate(solver.timesteps):
            rows = torch.cat([latents, latents]) if guided else latents
            rows = solver.scale_model_input(rows, timestep)
            prediction = denoise(rows, on_device[step].expand(len(rows)), embeds).float()
            if guided:
                uncond, cond = prediction.chunk(2)
                prediction = uncond + self.config.guidance * (cond - uncond)
            latents = solver.step(prediction, timestep, latents, return_dict=False)[0]
        return latents

    def _solver(self) -> DDIMScheduler | DPMSolverMultistepScheduler:
        if self.config.name == "ddim":
            return DDIMScheduler.from_config(dict(self.scheduler_config))
        return DPMSolverMultistepScheduler.from_config(dict(self.scheduler_config), algorithm_type="dpmsolver++")
