"""The reverse process as Gaussian steps whose mean is affine in the model's prediction.

A step draws `x' ~ N(a x_t + b p, sigma^2)` from the prediction p. Its log-probability is a denoising error against the
*pseudo-target* `T = (x' - a x_t) / b`, the prediction that would have made x' the mean, times a number:

    log N(x'; a x_t + b p, sigma^2), averaged over the latent = -kappa mean (p - T)^2 + offset
    kappa = b^2 / (2 sigma^2)        offset = -log sigma - log(2 pi) / 2

So policy gradients need only the denoising errors that every method here computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler
from torch import Tensor

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.diffusion.sampler import DiffusionSolver
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.utils.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """One step of the reverse process; see the module docstring.

    Attributes:
        timestep: the time at which the model is called.
        a: the factor of the latents in the mean.
        b: the factor of the prediction in the mean.
        sigma: the standard deviation; 0 for a deterministic step, which has no log-probability.
    """

    timestep: int
    a: float
    b: float
    sigma: float

    @property
    def kappa(self) -> float:
        """The factor that turns a denoising error against the pseudo-target into a negative log-probability."""
        return self.b**2 / (2 * self.sigma**2)

    @property
    def offset(self) -> float:
        """The log-probability, averaged over the latent, at an error of 0."""
        return -math.log(self.sigma) - math.log(2 * math.pi) / 2

    def mean(self, latents: Tensor, prediction: Tensor) -> Tensor:
        """Returns the mean of the next latents: `a x_t + b p`, `(B, *latent)` as both arguments."""
        return self.a * latents + self.b * prediction

    def pseudo_target(self, latents: Tensor, following: Tensor) -> Tensor:
        """Returns the prediction that would have made the following latents the mean: `(x' - a x_t) / b`.

        Args:
            latents: x_t, `(B, *latent)`. Use float32: rounding x' to float16 changes the log-probability by as much as
                the clip ranges of policy gradients.
            following: x', in the same shape.
        """
        return (following - self.a * latents) / self.b


def reverse_steps(
    scheduler_config: Mapping[str, Any],
    config: SamplerConfig,
    eta: float = 1.0,
    window: tuple[int, int] | None = None,
) -> tuple[Step, ...]:
    """Returns the steps of DDIM with noise (DDIM, eq. 12 and 16), from noise to data.

    Timesteps, spacing and offset are those of the pipeline's scheduler, and each step is that of its
    `DDIMScheduler.step(eta=eta)`, except at the end. There the process ends at `alphas_cumprod[0]`, also if the
    scheduler's `set_alpha_to_one` is true: ending at 1 would leave the last step without noise and with an infinite
    log-probability. A step from timestep 0 therefore would not move, and is left out; the model is not called for it.

    Args:
        scheduler_config: the configuration of the pipeline's scheduler.
        config: the sampler's settings; its guidance is not used here.
        eta: the share of DDPM's noise, above 0 and at most 1.
        window: the first and the last step, counted from 1, that are random; the others are deterministic (eta = 0), as
            in MixGRPO. None: all steps are random.

    Raises:
        ConfigError: The solver is not DDIM, the schedule cannot be sampled in so many steps, it clips what it predicts,
            or a step has no noise.
        ValueError: eta is out of range.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta: expected a number above 0 and at most 1, got {eta}: without noise no step is random")
    _refuse_other_solvers(scheduler_config, config)
    schedule = NoiseSchedule(scheduler_config)
    kept = schedule.alphas_cumprod.double().tolist()
    stride = schedule.num_timesteps // config.steps  # diffusers' own; not always the distance to the next timestep
    times = [int(time) for time in DiffusionSolver(scheduler_config, config).times]
    if max(times) >= len(kept):
        raise ConfigError(
            f"sampler.steps = {config.steps}: this model's schedule would sample timestep {max(times)} of {len(kept)}, "
            "counted from 0; use fewer steps"
        )
    steps = []
    first, last = window or (1, len(times))
    for number, time in enumerate(times, 1):
        if time == 0:
            continue
        now, following = kept[time], kept[max(time - stride, 0)]
        if not first <= number <= last:
            steps.append(Step(time, *_factors(now, following, 0.0, schedule.prediction_type), 0.0))
            continue
        variance = eta**2 * (1 - following) / (1 - now) * (1 - now / following)
        if variance <= 0:
            raise ConfigError(
                f"model.path: its scheduler adds no noise in the step from timestep {time} (alphas_cumprod {now}), so "
                "that step has no log-probability; correct its betas, or use another number of sampler.steps"
            )
        steps.append(Step(time, *_factors(now, following, variance, schedule.prediction_type), math.sqrt(variance)))
    return tuple(steps)


def _factors(now: float, following: float, variance: float, prediction_type: str) -> tuple[float, float]:
    """Returns a and b of the mean `sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps` for a prediction of eps or v."""
    direction = math.sqrt(max(1 - following - variance, 0.0))
    signal, noise, ahead = math.sqrt(now), math.sqrt(1 - now), math.sqrt(following)
    if prediction_type == "epsilon":
        return ahead / signal, direction - ahead * noise / signal
    return ahead * signal + direction * noise, direction * signal - ahead * noise


def _refuse_other_solvers(scheduler_config: Mapping[str, Any], config: SamplerConfig) -> None:
    """Raises a ConfigError unless each step is Gaussian, with a mean that is affine in one prediction."""
    if config.name != "ddim":
        raise ConfigError(
            f"sampler.name = {config.name!r}: its steps are not random, so they have no log-probability; this "
            "objective needs sampler.name = ddim"
        )
    settings = DDIMScheduler.from_config(dict(scheduler_config)).config
    for name in ("clip_sample", "thresholding"):
        if settings[name]:
            raise ConfigError(
                f"model.path: its scheduler clips the predicted x_0 ({name}), so a step's mean is not affine in the "
                f"prediction and its log-probability has no such form; set {name} to false in scheduler_config.json"
            )
