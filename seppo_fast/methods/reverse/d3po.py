"""D3PO: two samples of a prompt from one initial noise, compared by reward, and preferred step by step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.methods.generation import Keys
from seppo_fast.methods.losses.rows import LossRows
from seppo_fast.methods.losses.step_preference import preference_steps
from seppo_fast.methods.reverse.method import ReverseMethod
from seppo_fast.methods.reverse.transitions import StepRows, Transitions
from seppo_fast.methods.rewards.method import Groups, Iteration, left_out, scored

PUBLISHED_CLAMP = 0.1


class StepPreference(ReverseMethod):
    """Base class of D3PO and SPO: a preference between two steps, relative to the initial policy.

    Args:
        parts: the run's parts.
    """

    _needs_initial = True

    def _old(self, model: nn.Module, batch: Transitions) -> None:
        """Does nothing: ratios are to the initial policy."""

    def _initial(self, model: nn.Module, batch: Transitions) -> None:
        super()._old(model, batch)

    def _rows(self, prediction: Tensor, error: Tensor, old: Tensor, rows: StepRows) -> tuple[LossRows, list[Tensor]]:
        train, clamp = self._config.train, self._config.rl.clip or PUBLISHED_CLAMP
        made = preference_steps(error, old, rows.kappa, rows.advantage, beta=train.beta, clamp=clamp)
        # One column per row of the batch, two numbers each: of two predictions, or of two targets of one prediction.
        coefficients = made.coefficients
        if self._halves == 2:
            coefficients = coefficients.T.reshape(1, -1)
        return LossRows(made.loss, coefficients, made.sums), list(rows.targets)


class D3poMethod(StepPreference):
    """Trains on pairs of samples that a reward compares; ties are left out.

    Args:
        parts: the run's parts.
    """

    _halves = 2

    def _starts(self, keys: Keys) -> Keys:
        return [key[:2] for key in keys]

    def _advantages(self, begin: int, rewards: Groups) -> Groups:
        made = {}
        for place, (first, second) in rewards.items():
            sign = float(np.sign(first - second))
            made[place] = np.array([sign, -sign])
        return left_out(rewards, scored(made))

    def _batch(self, made: Iteration, update: int) -> Transitions:
        kept = made.kept(update)
        pairs = list(zip(kept[::2], kept[1::2], strict=True))
        rows = [(pair, step) for pair in pairs for step in self._trained_steps]
        advantage = torch.from_numpy(made.advantages[[first for (first, _), _ in rows]])
        total = made.counts[update] // 2 * len(self._trained_steps)
        return self._transitions(made, update, rows, total=total, advantage=advantage)
