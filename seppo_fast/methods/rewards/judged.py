"""SePPO whose sign is a scorer's verdict on each sample instead of the anchor test's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seppo_fast.loss import PreferenceLoss, denoising_errors
from seppo_fast.methods.losses.bands import band_sums
from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.pairs import Pairs, sent
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.preference import PreferenceMethod, averages, preference_sums
from seppo_fast.methods.rewards.judge import Judge

_OF_ALL = ("loss", "sft_loss", "winner_error", "loser_error", "ref_winner_error", "ref_loser_error", "judge_skipped")


class JudgedMethod(PreferenceMethod):
    """Trains like SePPO, but a scorer decides for each sample whether to reject it or to learn from it.

    The anchor test asks whether the policy already fits the winner better than the reference does, which says little
    about the sample. Here a scorer sees the sample and its winner as pictures. Winners suffice, as for SePPO.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        assert parts.judge is not None, "set_up must have loaded reference.judge by now"
        super().__init__(parts, Judge(parts.judge, parts.family, parts.cache))

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """See `Method` and `judged_loss`. It reads the predictions twice, where SePPO's kernel reads them once."""
        made = self.strategy.predictions(policy, micro_batch)
        assert made.ref_error is not None and micro_batch.verdict is not None
        train, device = self._config.train, made.policy.device
        leaf = made.policy.detach().requires_grad_()
        errors = denoising_errors(leaf, made.target, backend=train.backend)
        verdict = sent(micro_batch.verdict, device)
        result = judged_loss(errors, made.ref_error, verdict, beta=train.beta, sft_weight=train.sft_weight)
        (grad,) = torch.autograd.grad(result.loss, leaf, grad_scale)
        progress = sent(self._schedule.progress(micro_batch.times), device)
        sums = preference_sums(result, train.beta) | band_sums(result, progress)
        kept = verdict != 0
        anchor = (errors.detach() <= made.ref_error).chunk(2)[0]
        sums["judge_skipped"] = (~kept).float().sum()
        sums["anchor_agrees"] = ((anchor == (verdict > 0)) & kept).float().sum()
        if train.sft_weight:
            sums["sft_loss"] = result.sft_loss * len(verdict)
        return StepLoss(made.policy, grad, sums, halves=2)

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns what SePPO logs, and two values of this method's own.

        These are `judge_skipped`, the share of pairs without a verdict, and `anchor_agrees`, the share of the others on
        which the anchor test would have decided alike. The loss and the errors are means over all pairs; what depends
        on the sign is a mean over the pairs with a verdict, and is left out without such pairs.
        """
        kept = rows - round(sums["judge_skipped"])
        means = averages(sums, kept) if kept else {}
        return means | {name: sums[name] / rows for name in _OF_ALL if name in sums}


def judged_loss(
    errors: Tensor, ref_errors: Tensor, verdict: Tensor, *, beta: float, sft_weight: float = 0.0
) -> PreferenceLoss:
    """Computes `mean_b [|a| softplus((beta/2) (D_w - a D_l)) + sft_weight (beta/4) m_w]` with given signs a.

    Args:
        errors: the policy's denoising errors `(2b,)`, winners first; may require a gradient.
        ref_errors: the reference's, `(2b,)`.
        verdict: the signs `(b,)`: 1 rejects the loser, -1 learns from it, 0 leaves the preference term out. Pairs that
            are left out count in the mean, with 0.
        beta: strength of the pull to the reference.
        sft_weight: weight of the fine-tuning term on the winners; it applies to pairs without a verdict, too.

    Returns:
        The loss and its statistics. `reject` is the verdict's; only `loss` carries a gradient.
    """
    winner, loser = (errors - ref_errors).chunk(2)
    logit = -0.5 * beta * (winner - verdict * loser) * verdict.abs()
    preference = _mean(F.softplus(-logit) * verdict.abs())
    plain = 0.25 * beta * sft_weight * _mean(errors.chunk(2)[0]) if sft_weight else torch.zeros_like(preference)
    reject, detached = verdict > 0, logit.detach()
    return PreferenceLoss(
        loss=preference + plain,
        reject=reject,
        logit=detached,
        model_error=errors.detach(),
        ref_error=ref_errors,
        aaf_rate=_mean(reject.float()),
        implicit_acc=_mean((detached > 0).float()),
        preference_loss=preference.detach(),
        sft_loss=plain.detach(),
    )


def _mean(values: Tensor) -> Tensor:
    """Returns the mean, summed in float64 as in the fused losses: the mean of equal numbers is exactly that number."""
    return values.mean(dtype=torch.float64).float()
