"""The training target of a model: how a latent is noised at a given time, and what should be predicted from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import SchedulerMixin
from torch import Tensor

from seppo_fast.utils.errors import ConfigError

_LEAST_SIGNAL = 1e-6  # the least accepted alphas_cumprod at the last timestep; SD-1.5 has 4.7e-3
_OF_DIFFUSION = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}  # settings of diffusion schedulers


class Schedule(Protocol):
    """Interface of a model family's forward process and regression target.

    Attributes:
        dtype: the dtype of times: an integer dtype for timesteps, float32 for noise levels.
        shared_target: whether the target depends only on the noise, so that winner and loser of a pair share it.
    """

    @property
    def dtype(self) -> torch.dtype:
        """See above."""

    @property
    def shared_target(self) -> bool:
        """See above."""

    def draw(self, rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
        """Draws a time to train at. `latent_shape` is that of one sample, for schedules that depend on its size."""

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns latents `(B, *latent)` mixed with noise as at times `(B,)`."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns what the model should predict for these noised latents: `(B, *latent)`."""

    def clean(self, latents: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """Returns the clean latents `(B, *latent)` that a prediction at these noised latents implies."""

    def progress(self, times: Tensor) -> Tensor:
        """Returns the position of times `(B,)` in the forward process, float32 from 0 (clean) to 1 (noise)."""


class NoiseSchedule:
    """The forward process and the regression target of diffusion, from the pipeline's own scheduler.

    Args:
        config: the configuration of the pipeline's scheduler, never a default one.

    Raises:
        ConfigError: The prediction type is neither epsilon nor v_prediction; the noise schedule is invalid; or the
            model predicts epsilon with a schedule whose last timestep keeps no signal, where computing x_0 would mean a
            division by zero.
    """

    dtype = torch.int64

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = DDPMScheduler.from_config(dict(config))
        self.num_timesteps: int = self._scheduler.config.num_train_timesteps
        self.prediction_type: str = self._scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"model.path: its scheduler predicts {self.prediction_type!r}; only epsilon and v_prediction are "
                "supported"
            )
        kept = self._scheduler.alphas_cumprod
        if not ((kept >= 0) & (kept <= 1)).all():  # False for NaN too
            raise ConfigError(
                "model.path: its scheduler's betas are an invalid noise schedule (alphas_cumprod outside [0, 1])"
            )
        if self.prediction_type == "epsilon" and kept[-1] < _LEAST_SIGNAL:
            raise ConfigError(
                "model.path: its scheduler predicts epsilon, but its last timestep keeps no signal (alphas_cumprod "
                f"{float(kept[-1]):.1e}), so sampling is impossible: rescale_betas_zero_snr is for v_prediction. In "
                "scheduler_config.json, set it to false, or set prediction_type to what the model was trained with"
            )

    @property
    def alphas_cumprod(self) -> Tensor:
        """The signal's share of the variance at each timestep: `(num_timesteps,)` float32 on the CPU."""
        return self._scheduler.alphas_cumprod

    @property
    def shared_target(self) -> bool:
        """Whether the model predicts the noise."""
        return self.prediction_type == "epsilon"

    def draw(self, rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
        """Draws a timestep uniformly."""
        return int(rng.integers(self.num_timesteps))

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns `sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise` (q(x_t | x_0), DDPM eq. 4) for times `(B,)` int64."""
        return self._scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns what the model should predict: the noise, or v (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(latents, noise, times)

    def clean(self, latents: Tensor, prediction: Tensor, times: Tensor) -> Tensor:
        """Returns the estimate of x_0 (DDIM, eq. 9), or its form for v."""
        kept = self.alphas_cumprod[times.cpu()].to(latents).view(-1, *[1] * (latents.dim() - 1))
        if self.prediction_type == "epsilon":
            return (latents - (1 - kept).sqrt() * prediction) / kept.sqrt()
        return kept.sqrt() * latents - (1 - kept).sqrt() * prediction

    def progress(self, times: Tensor) -> Tensor:
        """Returns t / T of timesteps `(B,)`, float32."""
        return times.float() / self.num_timesteps


def check_diffusion(scheduler: SchedulerMixin) -> None:
    """Refuses a pipeline's scheduler that does not describe diffusion.

    `NoiseSchedule` would miss the betas and the prediction type in its settings and silently use their defaults.

    Raises:
        ConfigError: The scheduler is one of flow matching, of consistency models, or of any other process.
    """
    takes = set(inspect.signature(type(scheduler).__init__).parameters)
    flow = dict(scheduler.config).get("use_flow_sigmas")
    if flow or not takes >= _OF_DIFFUSION:
        how = "with use_flow_sigmas " if flow else ""
        raise ConfigError(
            f"model.path: its scheduler is a {type(scheduler).__name__} {how}and does not describe diffusion (with "
            "betas and a prediction type), which this kind of pipeline needs"
        )
