"""The family of objectives as a table: who generates the negatives, which reference is drawn, which flipper.

With D = m - r (policy error minus reference error, per sample), every row but SFT is
`loss = mean softplus((beta/2) (D_w - a D_l))`; the rows differ in `a` and in where `x_l` and `r` come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seppo_fast.loss import Backend, PreferenceLoss, denoising_errors, preference_loss


@dataclass(frozen=True)
class Objective:
    """One row.

    Attributes:
        flipper: the constant `a`: `adaptive` (+1 reject, -1 learn), `indicator` (+1, 0), `never` (+1).
        draw: which past policy is the reference: `uniform` over all so far, `newest`, `initial` (checkpoint 0);
            None: no reference at all, plain supervised fine-tuning.
        negatives: `generated` by the drawn reference, the `labelled` losers of the data, or None.
        winners: the `preferred` image of each example (SePPO-w), or a `random` one of its two images (SePPO-r).
        source: where the row comes from.
    """

    flipper: Literal["adaptive", "indicator", "never"]
    draw: Literal["uniform", "newest", "initial"] | None
    negatives: Literal["generated", "labelled"] | None
    winners: Literal["preferred", "random"]
    source: str

    @property
    def needs_pairs(self) -> bool:
        """Whether the data must hold two images per prompt."""
        return self.negatives == "labelled" or self.winners == "random"


OBJECTIVES: dict[str, Objective] = {
    "seppo": Objective("adaptive", "uniform", "generated", "preferred", "SePPO (SePPO-w), eq. 8-10 and Algorithm 1"),
    "seppo-r": Objective("adaptive", "uniform", "generated", "random", "SePPO-r: a random one of the two images"),
    "seppo-indicator": Objective("indicator", "uniform", "generated", "preferred", "SePPO table 4: flip to 0, not -1"),
    "seppo-never": Objective("never", "uniform", "generated", "preferred", "SePPO table 4: without the anchor test"),
    "seppo-initial": Objective("adaptive", "initial", "generated", "preferred", "SePPO table 4: ref = 0"),
    "seppo-newest": Objective("adaptive", "newest", "generated", "preferred", "SePPO table 4: ref = k-1"),
    "spin": Objective("never", "newest", "generated", "preferred", "SPIN-Diffusion"),
    "diffusion-dpo": Objective("never", "initial", "labelled", "preferred", "Diffusion-DPO, eq. 14"),
    "sft": Objective("never", None, None, "preferred", "supervised fine-tuning on the winners"),
}


@dataclass(frozen=True)
class StepLoss:
    """The loss of one micro-batch of b pairs and the numbers worth logging, each a sum over its pairs.

    Attributes:
        loss: scalar float32, differentiable in the prediction: the mean over the b pairs.
        sums: name to scalar float32 tensor on the device; nothing here syncs with the host.
    """

    loss: Tensor
    sums: dict[str, Tensor]


def step_loss(
    objective: Objective,
    model_pred: Tensor,
    target: Tensor,
    ref_error: Tensor | None,
    *,
    beta: float,
    tie_tol: float,
    backend: Backend,
) -> StepLoss:
    """The objective's loss on one micro-batch.

    Args:
        objective: a row of `OBJECTIVES`.
        model_pred: `(2b, *latent)`, winner half first; `(b, *latent)` for SFT.
        target: `(2b, *latent)`, or `(b, *latent)` shared by both halves.
        ref_error: `(2b,)` float32 errors of the reference on the same noised inputs; None for SFT.
        beta: multiplies a mean over latent elements.
        tie_tol: |D_w| up to this counts as a tie.
        backend: of the loss, `auto`, `triton` or `torch`.
    """
    if ref_error is None:
        errors = denoising_errors(model_pred, target, backend=backend)
        return StepLoss(errors.mean(), {"loss": errors.detach().sum(), "winner_error": errors.detach().sum()})
    result = preference_loss(
        model_pred,
        target,
        ref_error=ref_error,
        beta=beta,
        flipper=objective.flipper,
        tie_tol=tie_tol,
        backend=backend,
    )
    return StepLoss(result.loss, _sums(result, beta))


def _sums(result: PreferenceLoss, beta: float) -> dict[str, Tensor]:
    winner, loser = result.model_error.detach().chunk(2)
    ref_winner, ref_loser = result.ref_error.chunk(2)
    reject, correct = result.reject.float(), (result.logit.detach() > 0).float()
    return {
        "loss": result.loss.detach() * len(winner),
        "winner_error": winner.sum(),
        "loser_error": loser.sum(),
        "ref_winner_error": ref_winner.sum(),
        "ref_loser_error": ref_loser.sum(),
        "reject": reject.sum(),
        "margin": result.logit.detach().sum() * (-2 / beta),
        "logit_abs": result.logit.detach().abs().sum(),
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
