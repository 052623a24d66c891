"""What a model regresses on: how a latent is noised at a time, and what should be predicted there."""

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

_LEAST_SIGNAL = 1e-6  # of alphas_cumprod at the last timestep; SD-1.5 keeps 4.7e-3
_OF_DIFFUSION = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}  # settings of its schedulers


class Schedule(Protocol):
    """The forward process of a model family, and its regression target.

    Attributes:
        dtype: of times: integers for timesteps, float32 for noise levels.
        shared_target: whether the target is the noise alone, so that both halves of a pair have the same.
    """

    @property
    def dtype(self) -> torch.dtype:
        """See above."""

    @property
    def shared_target(self) -> bool:
        """See above."""

    def draw(self, rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
        """Returns a time to train at; `latent_shape` is of one sample, for shifts that depend on its size."""

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns latents `(B, *latent)` noised to times `(B,)`."""

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Returns what the model should predict there, `(B, *latent)`."""

    def progress(self, times: Tensor) -> Tensor:
        """Returns how far along the forward process times `(B,)` are, float32 from 0 (clean) to 1 (noise)."""


class NoiseSchedule:
    """The forward process and the regression target of diffusion, from the pipeline's own scheduler.

    Args:
        config: the configuration of the pipeline's scheduler; never a default one.

    Raises:
        ConfigError: a prediction type other than epsilon or v_prediction; an invalid noise schedule; epsilon-prediction
            of a schedule whose last step keeps no signal, where x_0 is the prediction divided by nothing.
    """

    dtype = torch.int64

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

    @property
    def shared_target(self) -> bool:
        """Whether the noise is what is predicted."""
        return self.prediction_type == "epsilon"

    def draw(self, rng: np.random.Generator, latent_shape: Sequence[int]) -> float:
        """Returns a timestep, each as likely as any other."""
        return int(rng.integers(self.num_timesteps))

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """q(x_t | x_0), DDPM eq. 4: `sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise`; `(B, *latent)`, times `(B,)` int64."""
        return self._scheduler.add_noise(latents, noise, times)

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model regresses on: the noise, or v (Salimans and Ho 2022, appendix D)."""
        if self.prediction_type == "epsilon":
            return noise
        return self._scheduler.get_velocity(latents, noise, times)

    def progress(self, times: Tensor) -> Tensor:
        """Returns t / T of timesteps `(B,)`, float32."""
        return times.float() / self.num_timesteps


def check_diffusion(scheduler: SchedulerMixin) -> None:
    """Refuses a pipeline's scheduler that is not one of diffusion: its settings would be read as epsilon's defaults.

    Raises:
        ConfigError: a scheduler of flow matching, of consistency models, or of any other process.
    """
    takes = set(inspect.signature(type(scheduler).__init__).parameters)
    flow = dict(scheduler.config).get("use_flow_sigmas")
    if flow or not takes >= _OF_DIFFUSION:
        how = "with use_flow_sigmas " if flow else ""
        raise ConfigError(
            f"model.path: its scheduler is a {type(scheduler).__name__} {how}and describes no diffusion (betas and a "
            "prediction type), which is what this kind of pipeline is trained on"
        )
