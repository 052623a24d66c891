"""Guided sampling in latent space, with any solver.

Shape legend: B rows, * the shape of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.utils.errors import ConfigError

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(latents (B, *latent), times (B,), conditioning of B rows) -> prediction (B, *latent)"""
Guide = Callable[[Tensor, Tensor, float], Tensor]
"""(conditional prediction, unconditional prediction, guidance scale) -> guided prediction, each (B, *latent)"""


class Solver(Protocol):
    """One trajectory from noise to data. A solver may keep earlier steps, so every batch needs a new one.

    Attributes:
        times: the times at which the model is called, from noise to data, on the CPU, in the model's units. There is
            one per step, except for `pndm`, which repeats the first.
    """

    times: Tensor

    def start(self, noise: Tensor) -> Tensor:
        """Returns the initial latents for standard normal `noise` `(B, *latent)`."""

    def model_input(self, latents: Tensor, time: Tensor) -> Tensor:
        """Returns the latents scaled as the model expects them at `time`."""

    def step(self, prediction: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """Returns the latents at the next time after `time`, given the model's prediction at `time`."""


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Applies classifier-free guidance (Ho and Salimans 2022): `uncond + scale (cond - uncond)`."""
    return unconditional + scale * (conditional - unconditional)


def with_uncond(conditioning: Conditioning, uncond: Conditioning, scale: float) -> Conditioning:
    """Returns the rows that `guided` needs: with guidance (a scale above 1) the empty prompt's first, B of them."""
    return Conditioning.cat([uncond.expand(conditioning.rows), conditioning]) if scale > 1 else conditioning


def guided(
    denoise: Denoise, latents: Tensor, times: Tensor, conditioning: Conditioning, guide: Guide, scale: float
) -> Tensor:
    """Returns the guided prediction `(B, *latent)` float32; without guidance, at a scale of 1, the conditional one.

    Args:
        denoise: runs the model, once for all rows.
        latents: `(B, *latent)`.
        times: `(B,)`, or a scalar, which all rows share and which costs no operation.
        conditioning: the rows that `with_uncond` returned.
        guide: combines the conditional and the unconditional prediction.
        scale: the guidance scale.
    """
    if scale <= 1:
        return denoise(latents, times.expand(len(latents)), conditioning).float()
    both = times.expand(2 * len(latents)) if times.dim() == 0 else torch.cat([times, times])
    prediction = denoise(torch.cat([latents, latents]), both, conditioning).float()
    unconditional, conditional = prediction.chunk(2)
    return guide(conditional, unconditional, scale)


# By `SamplerConfig.name`. No run trains with the last two, which published evaluations use (`diffusion.protocols`).
_SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),  # as in SD-1.5's own pipeline; the first step is repeated
    "euler": (EulerDiscreteScheduler, {}),
}


class DiffusionSolver:
    """A solver of diffusers, configured like `Scheduler.from_config(pipe.scheduler.config)`.

    Timestep spacing, offset and prediction type are therefore the pipeline's, and from the same noise it gives the same
    samples as the pipeline.

    Args:
        scheduler_config: the configuration of the pipeline's scheduler.
        config: the sampler's settings: which solver, and how many steps.

    Raises:
        ConfigError: There are more steps than timesteps in the schedule, or the schedule cannot be sampled.
    """

    def __init__(self, scheduler_config: Mapping[str, Any], config: SamplerConfig) -> None:
        kind, settings = _SCHEDULERS[config.name]
        self._scheduler = kind.from_config(dict(scheduler_config), **settings)
        timesteps = self._scheduler.config.num_train_timesteps
        if config.steps > timesteps:
            raise ConfigError(f"sampler.steps = {config.steps}: this model's schedule has only {timesteps} timesteps")
        try:
            # The timesteps stay on the CPU: they index the schedule without waiting for the device, and kernels get the
            # coefficients as plain numbers.
            self._scheduler.set_timesteps(config.steps)
            self.times: Tensor = self._scheduler.timesteps
            first, last = int(self.times.min()), int(self.times.max())
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as problem:
            raise ConfigError(f"model.path: its scheduler cannot be used: {problem}") from problem
        if not 0 <= first <= last <= timesteps:
            raise ConfigError(
                f"model.path: its scheduler has {timesteps} timesteps, but would sample timesteps {first} to {last}"
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
        config: the sampler's settings: number of steps, guidance scale and batch size.
        solver: a function that makes a new solver for latents of a given shape.
        guide: a function that combines the conditional and the unconditional prediction.
    """

    config: SamplerConfig
    solver: Callable[[Sequence[int]], Solver]
    guide: Guide = classifier_free

    @torch.no_grad()
    def __call__(self, denoise: Denoise, noise: Tensor, conditioning: Conditioning, uncond: Conditioning) -> Tensor:
        """Samples x_0 from noise.

        Args:
            denoise: a function that runs the model.
            noise: the initial noise: `(B, *latent)` float32, on the model's device.
            conditioning: B rows, one per sample.
            uncond: one row, for the empty prompt; ignored if guidance is 1.

        Returns:
            Scaled latents `(B, *latent)` float32.
        """
        solver = self.solver(tuple(noise.shape[1:]))
        on_device = solver.times.to(noise.device)  # one transfer for all steps; the model reads this copy
        scale = self.config.guidance
        both = with_uncond(conditioning, uncond, scale)
        latents = solver.start(noise)
        for step, time in enumerate(solver.times):
            rows = solver.model_input(latents, time)
            prediction = guided(denoise, rows, on_device[step], both, self.guide, scale)
            latents = solver.step(prediction, time, latents)
        return latents
