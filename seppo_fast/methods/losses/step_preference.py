"""The preference between two reverse steps: D3PO, and SPO's form of it."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from seppo_fast.methods.losses.rows import LossRows


def preference_steps(
    error: Tensor, ref_error: Tensor, kappa: Tensor, sign: Tensor, *, beta: float, clamp: float
) -> LossRows:
    """Computes `softplus(-beta y (log rho_1 - log rho_2))` with ratios clamped to [1 - eps, 1 + eps] (D3PO).

    `log rho_k = -kappa_k (e_k - e_k^ref)`. A row of two steps is two predictions with one target each (D3PO), or one
    prediction with two targets (SPO, whose steps share x_t). At D3PO's published beta of 0.1 and clamp of 0.1 the loss
    can only lie in [0.683, 0.703].

    Args:
        error: `(2, b)` errors of the policy against the pseudo-targets of the first and the second step.
        ref_error: `(2, b)` errors of the reference; the same bit for bit at equal weights.
        kappa: `(b,)`, or `(2, b)` if the two steps have different times.
        sign: `(b,)` y: 1 if the first step is preferred, -1 if the second is, 0 at a tie, which has no slope. Leave
            ties out of the batch and count them: they dilute the mean.
        beta: strength of the preference.
        clamp: eps. A clamped ratio has no slope; exactly at the clamp it still has one.

    Returns:
        b losses; coefficients `(2, b)`, which D3PO flattens to one row of 2b. Sums: `loss`; `clipped`, the number of
        rows with a clamped ratio; `correct`, the number of rows whose logit is positive.
    """
    kappa, sign = kappa.to(error).expand_as(error), sign.to(error)
    log_ratio = -kappa * (error - ref_error)
    # Clamped as a logarithm: exp and log would cost float32 most of the digits of a ratio so near 1.
    clamped = log_ratio.clamp(math.log1p(-clamp), math.log1p(clamp))
    logit = beta * sign * (clamped[0] - clamped[1])
    loss = F.softplus(-logit)
    outside = (clamped != log_ratio) & ~log_ratio.isnan()  # NaN must reach the gradient
    slope = beta * sign * logit.neg().sigmoid() / len(logit)
    coefficients = (kappa * sign.new_tensor([[1.0], [-1.0]]) * slope).masked_fill(outside, 0.0)
    sums = {
        "loss": loss.sum(),
        "clipped": outside.any(0).to(error).sum(),
        "correct": (logit > 0).to(error).sum(),
    }
    return LossRows(loss, coefficients, sums)
