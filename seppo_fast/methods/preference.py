"""The built-in objectives: SePPO and its variants, SPIN-Diffusion, Diffusion-DPO, supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from seppo_fast.config.objectives import SCORER, Objective
from seppo_fast.config.schema import Config
from seppo_fast.loss import Backend, PreferenceLoss, denoising_errors, loss_and_grad
from seppo_fast.methods.losses.bands import BAND_SUMS, band_averages, band_sums
from seppo_fast.methods.method import Method, StepLoss
from seppo_fast.methods.pairs import Pairs, sent
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.reference_errors import REFERENCE_STRATEGIES
from seppo_fast.methods.rollout import Rollout


class PreferenceMethod(Method):
    """Trains on pairs, by the denoising errors of policy and reference, or on winners alone without a reference.

    Args:
        parts: the run's parts.
        judge: see `Rollout`.
    """

    def __init__(self, parts: MethodParts, judge: Callable[[Sequence[int], Tensor], Tensor] | None = None) -> None:
        self._config: Config = parts.config
        self._schedule = parts.family.schedule
        strategy = REFERENCE_STRATEGIES[parts.config.reference.errors]
        self.strategy = strategy(parts.family, parts.denoiser, parts.sampler, parts.model, parts.config)
        self.rollout = Rollout(parts.config, parts.pair_maker(), self.strategy, parts.draws, parts.generation(), judge)

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """See `Method`."""
        return self.rollout.seconds

    @property
    def sampling_batch(self) -> int:  # type: ignore[override]
        """See `Method`."""
        return self.rollout.batch

    def collect(self, update: int, reference: int | None) -> Pairs:
        """Returns the pairs of an update: Algorithm 1, lines 4 to 6."""
        return self.rollout.pairs(update, reference)

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """Returns the loss on a micro-batch: Algorithm 1, lines 7 and 8 (AAF sign and loss), or another objective's."""
        made = self.strategy.predictions(policy, micro_batch)
        train = self._config.train
        return step_loss(
            self._config.row,
            made.policy,
            made.target,
            made.ref_error,
            beta=train.beta,
            tie_tol=train.tie_tol,
            sft_weight=train.sft_weight,
            safeguard=train.safeguard_mu if train.safeguard else None,
            grad_scale=grad_scale,
            backend=train.backend,
            progress=sent(self._schedule.progress(micro_batch.times), made.policy.device),
        )

    def make_room(self, parked: Callable[[], AbstractContextManager[None]]) -> None:
        """See `Method`."""
        self.rollout.offload_context = parked

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """See `averages`."""
        return averages(sums, rows)


def step_loss(
    objective: Objective,
    model_pred: Tensor,
    target: Tensor,
    ref_error: Tensor | None,
    *,
    beta: float,
    tie_tol: float,
    grad_scale: float | Tensor,
    backend: Backend,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    progress: Tensor | None = None,
) -> StepLoss:
    """Returns the objective's loss on a micro-batch of b pairs and its gradient with respect to `model_pred`.

    The loss adds nothing to the autograd graph of `model_pred`.

    Args:
        objective: a row of `OBJECTIVES`.
        model_pred: `(2b, *latent)` predictions of the policy, winner half first; `(b, *latent)` for SFT.
        target: `(2b, *latent)`, or `(b, *latent)` if both halves share it.
        ref_error: `(2b,)` float32 denoising errors of the reference on the same noised inputs; None for SFT.
        beta: strength of the pull to the reference; multiplies a mean over latent elements.
        tie_tol: |D_w| up to this counts as a tie.
        grad_scale: factor on the gradient: a number, or a float32 scalar on the device.
        backend: implementation of the loss: `auto`, `triton` or `torch`.
        sft_weight: weight of the fine-tuning term on the winners; see `preference_loss`.
        safeguard: mu of the scale on the losers' gradient, see `preference_loss`; None: off.
        progress: `(b,)` how far along the forward process each pair is, see `Schedule.progress`; None: no bands.
    """
    assert objective.flipper != SCORER, "JudgedMethod has its own loss"
    if ref_error is None:
        leaf = model_pred.detach().requires_grad_()
        errors = denoising_errors(leaf, target, backend=backend)
        scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=errors.device)
        (grad,) = torch.autograd.grad(errors.mean(), leaf, scale)
        loss = errors.detach().sum()
        return StepLoss(model_pred, grad, {"loss": loss, "winner_error": loss})
    result, grad = loss_and_grad(
        model_pred,
        target,
        ref_error=ref_error,
        beta=beta,
        flipper=objective.flipper,
        tie_tol=tie_tol,
        sft_weight=sft_weight,
        safeguard=safeguard,
        grad_scale=grad_scale,
        backend=backend,
    )
    sums = preference_sums(result, beta) | band_sums(result, progress)
    if sft_weight:
        sums["sft_loss"] = result.sft_loss * len(result.reject)
    return StepLoss(model_pred, grad, sums, halves=2)


def preference_sums(result: PreferenceLoss, beta: float) -> dict[str, Tensor]:
    """Returns the sums over pairs from which `averages` makes the values to log."""
    winner, loser = result.model_error.chunk(2)
    ref_winner, ref_loser = result.ref_error.chunk(2)
    reject, correct = result.reject.float(), (result.logit > 0).float()
    return {
        "loss": result.loss * len(winner),
        "preference_loss": result.preference_loss * len(winner),
        "winner_error": winner.sum(),
        "loser_error": loser.sum(),
        "ref_winner_error": ref_winner.sum(),
        "ref_loser_error": ref_loser.sum(),
        "reject": reject.sum(),
        "margin": result.logit.sum() * (-2 / beta),
        "logit_abs": result.logit.abs().sum(),
        "correct": correct.sum(),
        "correct_and_reject": (correct * reject).sum(),
    }


def averages(sums: dict[str, float], pairs: int) -> dict[str, float]:
    """Returns the values to log from sums over `pairs` pairs: means, and the implicit accuracy of each group of pairs.

    The groups are rejected and learned pairs. On learned pairs a positive logit does not measure preference accuracy,
    so the groups are mixed only in `implicit_acc`, which appendix B.2 of the paper logs over all pairs. A group without
    pairs is left out.
    """
    means = {name: value / pairs for name, value in sums.items() if name not in BAND_SUMS} | band_averages(sums)
    if "reject" not in sums:
        return means
    both, correct = means.pop("correct_and_reject") * pairs, means.pop("correct") * pairs
    rejected, learned = sums["reject"], pairs - sums["reject"]
    means["aaf_rate"] = means.pop("reject")
    means["implicit_acc"] = correct / pairs
    if rejected:
        means["implicit_acc_rejected"] = both / rejected
    if learned:
        means["implicit_acc_learned"] = (correct - both) / learned
    return means
