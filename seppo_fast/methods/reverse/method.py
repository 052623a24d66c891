"""What methods share that train on steps of the sampler, by log-probabilities that are denoising errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.diffusion.steps import Step
from seppo_fast.diffusion.trajectories import TrajectorySampler
from seppo_fast.loss import denoising_errors
from seppo_fast.methods.generation import Keys
from seppo_fast.methods.losses.rows import LossRows, weighted_error_gradient
from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.reverse.transitions import StepRows, Transitions
from seppo_fast.methods.rewards.method import Iteration, RewardMethod
from seppo_fast.models.family import Family
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.random import keyed_noise

PUBLISHED_CLIP, PUBLISHED_SIZE = 1e-4, 16384


def clip_for(numbers: int) -> float:
    """Returns DDPO's clip range for latents of so many numbers: `1e-4 sqrt(16384 / N)`.

    A log-probability is a mean over the latent. If the policy moves a step's mean by a given share of its noise, the
    log-ratio's spread falls with the root of N. So the published 1e-4, which is for SD-1.5 at 512 pixels, is scaled.
    """
    return PUBLISHED_CLIP * float(PUBLISHED_SIZE / numbers) ** 0.5


def steps_of(config: Config, family: Family) -> tuple[tuple[Step, ...], list[int]]:
    """Returns the sampler's steps, and the indices of those that are trained.

    Raises:
        ConfigError: The model's scheduler or the sampler's settings allow no such steps, or leave no step to train.
    """
    steps = family.reverse_steps(config.sampler, config.rl.eta, config.rl.window)
    plain = config.rl.plain_steps if config.row.reward == "steps" else 0
    trained = [index for index, step in enumerate(steps) if step.sigma][plain:]
    if not trained:
        raise ConfigError(
            f"sampler.steps = {config.sampler.steps} leaves no step to train: with this model's scheduler the last one "
            "starts at timestep 0 and moves nothing. Use more steps, or change rl.window or rl.plain_steps"
        )
    return steps, trained


class ReverseMethod(RewardMethod):
    """Base class of methods that train on the sampler's steps.

    The policy's prediction is the guided one, in training as in sampling, and both of its parts are trained.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        config, family = parts.config, parts.family
        self._steps, self._trained_steps = steps_of(config, family)
        self._sampler = TrajectorySampler(self._steps, family.guide, config.sampler.guidance)

    def loss(self, policy: nn.Module, micro_batch: StepRows, grad_scale: Tensor) -> StepLoss:
        """Returns the loss on a micro-batch, by one guided forward."""
        prediction = self._predict(policy, micro_batch)
        error = self._errors(prediction, micro_batch)
        old = error if micro_batch.old_error is None else micro_batch.old_error
        made, targets = self._rows(prediction.detach(), error, old, micro_batch)
        gradient = weighted_error_gradient(prediction, targets, made.coefficients * grad_scale)
        # A spare row has a factor of 0 on its gradient already.
        return StepLoss(
            prediction, gradient, {name: value * min(1, len(micro_batch)) for name, value in made.sums.items()}
        )

    def _predict(self, model: nn.Module, rows: StepRows) -> Tensor:
        guidance = self._config.sampler.guidance
        return self._parts.denoiser.guided(model, rows.latents, rows.times, rows.conditioning, rows.uncond, guidance)

    def _errors(self, prediction: Tensor, rows: StepRows) -> Tensor:
        """Returns the errors against the pseudo-targets, `(hk, b)` without a gradient."""
        backend, count = self._config.train.backend, len(rows.step)
        errors = [denoising_errors(prediction.detach(), target, backend=backend) for target in rows.targets]
        return torch.stack(errors, dim=1).view(count, -1).T

    def _old(self, model: nn.Module, batch: Transitions) -> None:
        batch.old_error = torch.cat([self._errors(made, rows) for made, rows in self._ahead(model, batch)], 1).cpu()

    def _ahead(self, model: nn.Module, batch: Transitions) -> Iterator[tuple[Tensor, StepRows]]:
        """Yields another model's predictions on the learner's micro-batches, as the learner computes them."""
        assert self._config.train.micro_batch is not None
        for rows in batch.micro_batches(self._config.train.micro_batch):
            self._parts.interruption.check()
            with torch.enable_grad():  # see `predict_like_policy`
                made = self._predict(model, rows).detach()
            yield made, rows

    def _sample(self, model: nn.Module, keys: Keys) -> Tensor:
        noise, conditioning, uncond = self._maker.generation(self._starts(keys))
        seed, shape = self._config.seed, noise.shape[1:]

        def step_noise(index: int) -> Tensor:
            return keyed_noise(seed, "sde", [(*key, *([] if len(key) > 2 else [0]), index) for key in keys], shape)

        return self._parts.denoiser.trajectories(model, self._sampler, noise, conditioning, uncond, step_noise)

    def _starts(self, keys: Keys) -> Keys:
        """Returns the keys of the samples' initial noise."""
        return keys

    def _finals(self, samples: Tensor) -> Tensor:
        return samples[:, -1]

    def _transitions(
        self, made: Iteration, update: int, rows: Sequence[tuple[Sequence[int], int]], *, total: int, advantage: Tensor
    ) -> Transitions:
        """Returns rows of an update.

        Args:
            made: the iteration.
            update: the update's index.
            rows: for each row its h samples, by their places in `made`, and its step.
            total: see `Transitions`.
            advantage: what each row teaches.
        """
        spare = not rows
        if spare:
            rows, advantage = [([made.spare(update)] * self._halves, self._trained_steps[0])], torch.zeros(1)
        samples = torch.tensor([places for places, _ in rows])
        step = torch.tensor([number for _, number in rows])
        ids = torch.tensor([key[1] for key in made.keys])
        now, following = self._places(samples, step)
        return Transitions(
            sample_ids=tuple(ids[samples[:, 0]].tolist()),
            total=total,
            store=made.samples.reshape(-1, *self._parts.cache.latent_shape),
            now=now,
            following=following,
            step=step,
            steps=self._steps,
            examples=ids[samples] % len(self._parts.cache),
            advantage=advantage.float(),
            conditioning=self._parts.cache.conditioning,
            device=self._parts.denoiser.device,
            spare=spare,
        )

    def _places(self, samples: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the places `(B, h)` of x_t and `(B, h, k)` of what follows in an iteration's latents.

        Args:
            samples: `(B, h)` places of samples.
            step: `(B,)` indices of steps.
        """
        now = samples * (len(self._steps) + 1) + step[:, None]
        return now, now[..., None] + 1

    _halves = 1
    """Number of predictions in a row."""

    @abstractmethod
    def _rows(self, prediction: Tensor, error: Tensor, old: Tensor, rows: StepRows) -> tuple[LossRows, list[Tensor]]:
        """Returns the loss of a micro-batch, and the targets that its coefficients belong to.

        Args:
            prediction: the guided prediction `(bh, *latent)`, without a gradient.
            error: `(hk, b)`.
            old: `(hk, b)` errors of the policy to compare with.
            rows: the micro-batch.
        """
