"""The loss of the objectives on one micro-batch, and what the log shows of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.config.objectives import Objective
from seppo_fast.loss import Backend, PreferenceLoss, denoising_errors, loss_and_grad


@dataclass(frozen=True)
class StepLoss:
    """What one micro-batch of b pairs gives.

    Attributes:
        grad: of the mean loss over the b pairs to the prediction, scaled as asked; what `model_pred.backward` takes.
        sums: name to scalar float32 tensor on the device, each a sum over the pairs; nothing here syncs with the host.
    """

    grad: Tensor
    sums: dict[str, Tensor]


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
) -> StepLoss:
    """The objective's loss on one micro-batch, and its gradient, without a graph of its own.

    Args:
        objective: a row of `OBJECTIVES`.
        model_pred: `(2b, *latent)`, winner half first; `(b, *latent)` for SFT.
        target: `(2b, *latent)`, or `(b, *latent)` shared by both halves.
        ref_error: `(2b,)` float32 errors of the reference on the same noised inputs; None for SFT.
        beta: multiplies a mean over latent elements.
        tie_tol: |D_w| up to this counts as a tie.
        grad_scale: multiplies the gradient; a number or one float32 on the device.
        backend: of the loss, `auto`, `triton` or `torch`.
    """
    if ref_error is None:
        leaf = model_pred.detach().requires_grad_()
        errors = denoising_errors(leaf, target, backend=backend)
        scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=errors.device)
        (grad,) = torch.autograd.grad(errors.mean(), leaf, scale)
        loss = errors.detach().sum()
        return StepLoss(grad, {"loss": loss, "winner_error": loss})
    result, grad = loss_and_grad(
        model_pred,
        target,
        ref_error=ref_error,
        beta=beta,
        flipper=objective.flipper,
        tie_tol=tie_tol,
        grad_scale=grad_scale,
        backend=backend,
    )
    return StepLoss(grad, _sums(result, beta))


def _sums(result: PreferenceLoss, beta: float) -> dict[str, Tensor]:
    winner, loser = result.model_error.chunk(2)
    ref_winner, ref_loser = result.ref_error.chunk(2)
    reject, correct = result.reject.float(), (result.logit > 0).float()
    return {
        "loss": result.loss * len(winner),
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
    """Sums over `pairs` pairs to what the log shows: means, and the implicit accuracy of rejected and learned apart.

    On learned pairs a positive logit is no preference accuracy, so the two groups are never mixed but in
    `implicit_acc`, which appendix B.2 of the paper logs over all pairs. A group without pairs is left out.
    """
    means = {name: value / pairs for name, value in sums.items()}
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


def total(sums: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Adds the sums of several micro-batches, on the device."""
    return {name: torch.stack([one[name] for one in sums]).sum() for name in sums[0]}
