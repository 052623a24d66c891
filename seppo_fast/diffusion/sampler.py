"""Guided sampling in latent space, by any solver.

Shape legend: B rows, * the shape of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.utils.errors import ConfigError

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents (B, *latent), times (B,), conditioning of B rows) -> prediction (B, *latent)"""
Guide = Callable[[Tensor, Tensor, float], Tensor]
"""(conditional prediction, unconditional prediction, guidance scale) -> guided prediction, each (B, *latent)"""


class Solver(Protocol):
    """One walk from noise to data; it may remember earlier steps, so every batch takes a new one.

    Attributes:
        times: `(steps,)` on the CPU, as the model is given them, from noise to data.
    """

    times: Tensor

    def start(self, noise: Tensor) -> Tensor:
        """Returns the first latents of standard normal `noise` `(B, *latent)`."""

    def model_input(self, latents: Tensor, time: Tensor) -> Tensor:
        """Returns the latents as the model takes them at a time."""

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """Returns the latents at the time after `time`."""


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): `uncond + scale (cond - uncond)`."""
    return unconditional + scale * (conditional - unconditional)


class DiffusionSolver:
    """diffusers' own solver, configured as `Scheduler.from_config(pipe.scheduler.config)` does it.

    So spacing, offset and prediction type are the pipeline's, and samples equal the pipeline's at the same noise.

    Args:
        scheduler_config: the configuration of the pipeline's scheduler.
        config: solver and number of steps.

    Raises:
        ConfigError: more steps than the schedule has timesteps, or a schedule that cannot be sampled.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], config: SamplerConfig) -> None:
        if config.name == "ddim":
            self._scheduler = DDIMScheduler.from_config(dict(scheduler_config))
        else:
            self._scheduler = DPMSolverMultistepScheduler.from_config(
                dict(scheduler_config), algorithm_type="dpmsolver++"
            )
        timesteps = self._scheduler.config.num_train_timesteps
        if config.steps > timesteps:
            raise ConfigError(
                f"sampler.steps = {config.steps}: this model's schedule has {timesteps} timesteps, not more"
            )
        try:
            # Its timesteps stay on the CPU: there they index the schedule without a wait for the device, and the
            # coefficients go into the kernels as numbers.
            self._scheduler.set_timesteps(config.steps)
            self.times: Tensor = self._scheduler.timesteps
            first, last = int(self.times.min()), int(self.times.max())
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as problem:
            raise ConfigError(f"model.path: its scheduler cannot be used: {problem}") from problem
        if not 0 <= first <= last <= timesteps:
            raise ConfigError(
                f"model.path: its scheduler has {timesteps} timesteps, and would sample {first} to {last}"
            )

    def start(self, noise: Tensor) -> Tensor:
        """See `Solver`."""
        return noise * self._scheduler.init_noise_sigma

    def model_input(self, latents: Tensor, time: Tensor) -> Tensor:
        """See `Solver`."""
        return self._scheduler.scale_model_input(latents, time)

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """See `Solver`."""
        return self._scheduler.step(prediction, time, latents, return_dict=False)[0]


@dataclass(frozen=True)
class Sampler:
    """Deterministic guided sampling.

    Attributes:
        config: number of steps, guidance scale and batch.
        solver: makes a solver for latents of a shape.
        guide: puts the two predictions of guided sampling together.
    """

    config: SamplerConfig
    solver: Callable[[Sequence[int]], Solver]
    guide: Guide = classifier_free

    @torch.no_grad()
    def __call__(self, denoise: Denoise, noise: Tensor, conditioning: Conditioning, uncond: Conditioning) -> Tensor:
        """Samples x_0 from noise.

        Args:
            denoise: the model.
            noise: `(B, *latent)` float32, on the device of the model.
            conditioning: B rows.
            uncond: one row, of the empty prompt; not read where guidance is 1.

        Returns:
            Scaled latents `(B, *latent)` float32.
        """
        solver = self.solver(tuple(noise.shape[1:]))
        on_device = solver.times.to(noise.device)  # the model reads a copy that is sent once
        guided = self.config.guidance > 1
        both = Conditioning.cat([uncond.expand(len(noise)), conditioning]) if guided else conditioning
        latents = solver.start(noise)
        for step, time in enumerate(solver.times):
            rows = torch.cat([latents, latents]) if guided else latents
            rows = solver.model_input(rows, time)
            prediction = denoise(rows, on_device[step].expand(len(rows)), both).float()
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = self.guide(conditional, unconditional, self.config.guidance)
            latents = solver.step(prediction, time, latents)
        return latents
