"""Noising and targets, of the schedule that a pipeline brings.

Shape legend: B rows, * the shape of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from seppo_fast.utils.errors import ConfigError

_LEAST_SIGNAL = 1e-6  # of alphas_cumprod at the last timestep; SD-1.5 keeps 4.7e-3


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
