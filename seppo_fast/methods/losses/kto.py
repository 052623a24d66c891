"""Diffusion-KTO: single pictures that people liked or disliked, without pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from seppo_fast.methods.losses.rows import LossRows


def kto(
    error: Tensor,
    ref_error: Tensor,
    liked: Tensor,
    offset: Tensor,
    *,
    beta: float,
    weights: tuple[float, float] = (1.0, 1.0),
) -> LossRows:
    """Computes `w_y (1 - sigmoid(y beta ((r - m) - z_0)))` with y = 1 if liked, -1 if not (Diffusion-KTO).

    Args:
        error: `(b,)` m, errors of the policy.
        ref_error: `(b,)` r, errors of the reference.
        liked: `(b,)` bool labels.
        offset: `()` z_0; see `kto_offset`. It carries no gradient.
        beta: strength of the pull to the reference. There is no factor of 1/2 here, unlike in Diffusion-DPO.
        weights: the factors w on liked and on disliked rows.

    Returns:
        One loss and one row of coefficients per row. Sums: `loss`; `liked`, the number of liked rows; `correct`, the
        number of rows whose r - m is above z_0 if liked, and below it if not.
    """
    sign = liked.to(error) * 2 - 1
    factor = torch.where(liked, weights[0], weights[1]).to(error)
    logit = sign * beta * ((ref_error - error) - offset.to(error))
    loss = factor * logit.neg().sigmoid()
    slope = loss * sign * beta * logit.sigmoid() / len(error)
    sums = {"loss": loss.sum(), "liked": liked.to(error).sum(), "correct": (logit > 0).to(error).sum()}
    return LossRows(loss, slope[None], sums)


def kto_offset(gain: Tensor, count: int) -> Tensor:
    """Returns z_0, the mean of r - m over the rows of all processes, at least 0.

    Args:
        gain: `()` the sum of r - m over those rows.
        count: the number of those rows.
    """
    return (gain / count).clamp(min=0.0)
