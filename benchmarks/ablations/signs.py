"""Two anchor tests for the ablation only: SePPO's signs in random order, and a sign from the policy's errors alone."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seppo_fast.config.objectives import Objective
from seppo_fast.loss import denoising_errors
from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.pairs import Pairs
from seppo_fast.methods.preference import PreferenceMethod
from seppo_fast.methods.registry import register
from seppo_fast.utils.random import keyed_rng

RANDOM_SIGN, LOSER_SIGN = "random-sign", "loser-sign"


class SignedMethod(PreferenceMethod):
    """SePPO with another rule for which pairs to reject."""

    @abstractmethod
    def rejected(self, errors: Tensor, ref_errors: Tensor, pairs: Pairs) -> Tensor:
        """Returns which of b pairs to reject.

        Args:
            errors: the policy's denoising errors, `(2b,)`, winners first.
            ref_errors: the reference's denoising errors, `(2b,)`, winners first.
            pairs: the pairs.

        Returns:
            `(b,)` bool.
        """

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """Returns the loss `mean softplus((beta/2)(D_w - a D_l))` with the rule's sign `a`; see `Method`."""
        made = self.strategy.predictions(policy, micro_batch)
        assert made.ref_error is not None
        leaf = made.policy.detach().requires_grad_()
        errors = denoising_errors(leaf, made.target)
        winner, loser = (errors - made.ref_error).chunk(2)
        reject = self.rejected(errors.detach(), made.ref_error, micro_batch)
        logit = -0.5 * self._config.train.beta * (winner - torch.where(reject, 1.0, -1.0) * loser)
        losses = F.softplus(-logit)
        (grad,) = torch.autograd.grad(losses.mean(), leaf, grad_scale)
        sums = {
            "loss": losses.detach().sum(),
            "winner_error": errors.detach().chunk(2)[0].sum(),
            "ref_winner_error": made.ref_error.chunk(2)[0].sum(),
            "reject_rate": reject.float().sum(),
        }
        return StepLoss(made.policy, grad, sums)

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns the means over rows."""
        return {name: value / rows for name, value in sums.items()}


class RandomSign(SignedMethod):
    """Rejects as many pairs of each micro-batch as SePPO would, but chooses them at random."""

    def rejected(self, errors: Tensor, ref_errors: Tensor, pairs: Pairs) -> Tensor:
        """See `SignedMethod`."""
        own = (errors <= ref_errors).chunk(2)[0]
        rng = keyed_rng(self._config.seed, "random sign", *pairs.sample_ids)
        return own[torch.from_numpy(rng.permutation(len(own)))]


class LoserSign(SignedMethod):
    """Rejects a pair if the policy's error on the loser is larger than on the winner, at the same time and noise."""

    def rejected(self, errors: Tensor, ref_errors: Tensor, pairs: Pairs) -> Tensor:
        """See `SignedMethod`."""
        winner, loser = errors.chunk(2)
        return loser > winner


def register_signs() -> None:
    """Registers both as objectives; call it once per process."""
    for name, method in {RANDOM_SIGN: RandomSign, LOSER_SIGN: LoserSign}.items():
        register(name, Objective("adaptive", "uniform", "generated", "preferred", "benchmarks.ablation"), method)
