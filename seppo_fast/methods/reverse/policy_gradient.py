"""DDPO and GRPO: the clipped policy gradient on the sampler's steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.loss import denoising_errors
from seppo_fast.methods.losses.policy_gradient import ddpo, grpo
from seppo_fast.methods.losses.rows import LossRows
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.reverse.method import ReverseMethod, clip_for
from seppo_fast.methods.reverse.transitions import StepRows, Transitions
from seppo_fast.methods.rewards.advantages import ADVANTAGE_CLIP, PromptStatistics
from seppo_fast.methods.rewards.method import Groups, Iteration, compared_in_groups, left_out, scored
from seppo_fast.utils.random import keyed_rng


class PolicyGradient(ReverseMethod):
    """Base class of both: rows are single steps of samples.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        self.clip = parts.config.rl.clip or clip_for(math.prod(parts.cache.latent_shape))
        self._trained = max(1, round(parts.config.rl.steps * len(self._trained_steps)))

    def _batch(self, made: Iteration, update: int) -> Transitions:
        rows = [(place, step) for place in made.kept(update) for step in self._chosen(made.keys[place])]
        advantage = torch.from_numpy(made.advantages[[place for place, _ in rows]])
        total = made.counts[update] * self._trained
        return self._transitions(made, update, [([p], s) for p, s in rows], total=total, advantage=advantage)

    def _chosen(self, key: tuple[int, ...]) -> list[int]:
        """Returns the steps of a sample that are trained: all, or a random subset that depends on its key alone."""
        if self._trained == len(self._trained_steps):
            return self._trained_steps
        order = keyed_rng(self._config.seed, "steps", *key).permutation(len(self._trained_steps))
        return sorted(self._trained_steps[place] for place in order[: self._trained])

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns the means over the rows; `clipped` also for each step, counted from 1, as `clipped_step1`, ..."""
        by_step = {}
        for step in range(1, len(self._steps) + 1):
            clipped, count = sums.pop(f"clipped_step{step}", 0.0), sums.pop(f"rows_step{step}", 0.0)
            if count:
                by_step[f"clipped_step{step}"] = clipped / count
        return super().averages(sums, rows) | by_step

    def _by_step(self, made: LossRows, error: Tensor, old: Tensor, rows: StepRows) -> LossRows:
        """Adds the numbers of rows and of clipped ratios by step."""
        clipped = (torch.expm1(-rows.kappa * (error - old)).abs() > self.clip).float()
        for name, values in {"clipped": clipped, "rows": torch.ones_like(clipped)}.items():
            by_step = values.new_zeros(len(self._steps)).index_add_(0, rows.step, values)
            made.sums.update({f"{name}_step{step}": value for step, value in enumerate(by_step.unbind(), 1)})
        return made


class DdpoMethod(PolicyGradient):
    """DDPO: advantages by the latest rewards of each prompt.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        rl = parts.config.rl
        self._statistics = PromptStatistics(rl.prompt_buffer, rl.prompt_count)
        self._begin: int | None = None
        self._before: dict[str, Any] = {}

    def _advantages(self, begin: int, rewards: Groups) -> Groups:
        self._begin, self._before = begin, self._statistics.state_dict()
        known = scored(rewards)
        if not known:
            return left_out(rewards, {})
        prompts = [prompt for prompt in self._everyones_prompts(known) for _ in range(self._config.samples_per_prompt)]
        flat = self._statistics.advantages(prompts, np.concatenate(list(known.values())), clip=ADVANTAGE_CLIP)
        return left_out(rewards, dict(zip(known, flat.reshape(len(known), -1), strict=True)))

    def _rows(self, prediction: Tensor, error: Tensor, old: Tensor, rows: StepRows) -> tuple[LossRows, list[Tensor]]:
        made = ddpo(error[0], old[0], rows.kappa, rows.advantage, clip=self.clip)
        return self._by_step(made, error[0], old[0], rows), [rows.targets[0]]

    def state(self, finished: int) -> dict[str, Any]:
        """Returns the prompts' rewards as they were before the iteration that the next update belongs to."""
        length = self._config.train.updates_per_iteration
        # A resumed run samples an unfinished iteration again, and then adds its rewards.
        unfinished = self._begin is not None and finished < self._begin + length
        return self._before if unfinished else self._statistics.state_dict()

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """See `Method`."""
        self._statistics.load_state_dict(state)


class GrpoMethod(PolicyGradient):
    """GRPO: advantages within the samples of a prompt, and a pull to the initial policy.

    Args:
        parts: the run's parts.
    """

    def _advantages(self, begin: int, rewards: Groups) -> Groups:
        return compared_in_groups(rewards, self._config.rl.spread)

    def _initial(self, model: nn.Module, batch: Transitions) -> None:
        made = torch.cat([prediction.cpu() for prediction, _ in self._ahead(model, batch)])
        batch.reference = made.unflatten(0, (-1, self._halves))

    def _rows(self, prediction: Tensor, error: Tensor, old: Tensor, rows: StepRows) -> tuple[LossRows, list[Tensor]]:
        target, clip, kl = rows.targets[0], self.clip, self._config.rl.kl
        if rows.reference is None:
            made = ddpo(error[0], old[0], rows.kappa, rows.advantage, clip=clip)
            return self._by_step(made, error[0], old[0], rows), [target]
        gap = denoising_errors(prediction, rows.reference, backend=self._config.train.backend)
        made = grpo(error[0], old[0], gap, rows.kappa, rows.advantage, clip=clip, kl=kl)
        return self._by_step(made, error[0], old[0], rows), [target, rows.reference]
