"""Noising, targets, guided sampling, and the randomness behind them.

Every random number is a pure function of (seed, purpose, update, sample id), drawn on the CPU from a counter-based
generator. So a run gives the same pairs on any device, for any number of processes and any split into micro-batches.

Shape legend: B rows, C channels, H x W latent size, L tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from seppo_fast.config import SamplerConfig
from seppo_fast.errors import ConfigError

_LEAST_SIGNAL = 1e-6  # of alphas_cumprod at the last timestep; SD-1.5 keeps 4.7e-3

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, *latent), timesteps (B,) int64, prompt_embeds (B, L, D)) -> prediction (B, *latent)"""


def keyed_rng(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """A generator that depends on (seed, purpose, key) alone. torch's CPU generator keeps 32 bits of a seed."""
    numbers = int(seed), purpose, *(int(number) for number in key)  # numpy's are written otherwise
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def keyed_noise(seed: int, purpose: str, keys: Sequence[Sequence[int]], latent_shape: Sequence[int]) -> Tensor:
    """Standard normal noise `(B, *latent)`, float32 on the CPU, one independent stream per key."""
    draws = [keyed_rng(seed, purpose, *key).standard_normal(latent_shape, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(draws))


class NoiseSchedule:
    """The forward process and the regression target, from the pipeline's own scheduler (never from a default).

    Args:
        config: the configuration of the pipeline's scheduler.

    Raises:
        ConfigError: a prediction type other than epsilon or v_prediction; an invalid noise schedule; epsilon-prediction
            of a schedule whose last step keeps no signal, where x_0 is the prediction divided by nothing.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = DDPMScheduler.from_config(dict(config))
        self.num_timesteps: int = self._scheduler.config.num_train_timesteps
        self.prediction_type: str = self._scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"model.path: its scheduler predicts {self.prediction_type!r}; epsilon and v_prediction can be trained"
            )
        kept = self._scheduler.alphas_cumprod
        if not ((kept >= 0) & (kept <= 1)).all():  # nor NaN
            raise ConfigError("model.path: its scheduler's betas are no noise schedule")
        if self.prediction_type == "epsilon" and kept[-1] < _LEAST_SIGNAL:
            raise ConfigError(
                "model.path: its scheduler predicts epsilon, and its last timestep keeps no signal (alphas_cumprod "
                f"{float(kept[-1]):.1e}), so nothing can be sampled: rescale_betas_zero_snr is for v_prediction. "
                "Set that to false, or prediction_type to what the model was trained on, in scheduler_config.json"
            )

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0), DDPM eq. 4: `sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`; `(B, *latent)`, timesteps `(B,)`."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model regresses on: the noise, or v (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(latents, noise, timesteps)


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
