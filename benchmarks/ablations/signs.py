"""Two anchors that are not the product's: SePPO's signs dealt at random, and a sign that looks at the policy alone."""

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
    """SePPO with another rule for which pairs reject."""

    @abstractmethod
    def rejected(self, errors: Tensor, ref_errors: Tensor, pairs: Pairs) -> Tensor:
        """Returns which of b pairs reject, `(b,)` bool, by errors `(2b,)`, winner half first."""

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """See `Method`: `mean softplus((beta/2)(D_w - a D_l))` with the rule's `a`."""
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
        """Returns the means."""
        return {name: value / rows for name, value in sums.items()}


class RandomSign(SignedMethod):
    """As many pairs of each micro-batch reject as SePPO would reject, but which ones is a matter of chance."""

    def rejected(self, errors: Tensor, ref_errors: Tensor, pairs: Pairs) -> Tensor:
        """See `SignedMethod`."""
        own = (errors <= ref_errors).chunk(2)[0]
        rng = keyed_rng(self._config.seed, "random sign", *pairs.sample_ids)
        return own[torch.from_numpy(rng.permutation(len(own)))]


class LoserSign(SignedMethod):
    """A pair rejects where the policy fits the loser worse than the winner at the same time and noise."""

    def rejected(self, errors: Tensor, ref_errors: Tensor, pairs: Pairs) -> Tensor:
        """See `SignedMethod`."""
        winner, loser = errors.chunk(2)
        return loser > winner


def register_signs() -> None:
    """Makes both known as objectives, once a process."""
    for name, method in {RANDOM_SIGN: RandomSign, LOSER_SIGN: LoserSign}.items():
        register(name, Objective("adaptive", "uniform", "generated", "preferred", "benchmarks.ablation"), method)
