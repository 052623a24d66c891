"""What a loss of per-row numbers returns, and how its slopes become the gradient of a prediction.

Each of these losses depends on the prediction p only by its mean squared errors `e_k = mean_N (p - T_k)^2` against one
or more targets T_k. So its gradient is a weighted sum of residuals, whatever the loss:

    dloss/dp = sum_k (dloss/de_k) 2 (p - T_k) / N
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossRows:
    """The losses of b rows and their slopes in the errors. Nothing here carries a gradient.

    Attributes:
        loss: `(b,)` the losses; what is minimised is their mean.
        coefficients: `(k, rows)` the slope of that mean in each row's error against each of its k targets. A pair of
            predictions has two rows for its one loss, winners first.
        sums: the values to log, each a sum over the b losses; see `StepLoss.sums`.
    """

    loss: Tensor
    coefficients: Tensor
    sums: dict[str, Tensor]


def with_pull(rows: LossRows, name: str, gap: Tensor, weight: Tensor | float) -> LossRows:
    """Adds `weight * gap` to each loss; gap is one more error, against another model's prediction.

    With `weight = strength * kappa` this is `strength` times the KL divergence of a step of the reverse process from
    the other model's, averaged over the latent: `mean (mu - mu')^2 / (2 sigma^2) = kappa mean (p - p')^2`.

    Args:
        rows: a loss with one row per loss.
        name: the name under which `weight * gap` is logged.
        gap: `(b,)` mean squared differences of the two predictions.
        weight: `(b,)`, or one number.
    """
    term = weight * gap
    slope = torch.as_tensor(weight, dtype=gap.dtype, device=gap.device).expand_as(gap) / len(gap)
    loss = rows.loss + term
    return LossRows(
        loss, torch.cat([rows.coefficients, slope[None]]), rows.sums | {"loss": loss.sum(), name: term.sum()}
    )


@torch.no_grad()
def weighted_error_gradient(prediction: Tensor, targets: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """Computes `sum_k c_k 2 (p - T_k) / N`, the gradient of `sum c_k e_k` in the prediction p.

    Args:
        prediction: `(R, *latent)` in any float dtype.
        targets: k tensors of the prediction's shape, or `(R / 2, *latent)` if the two halves of the rows share them.
        coefficients: `(k, R)`, the weights c of the errors; see `LossRows`.

    Returns:
        `(R, *latent)` in the prediction's dtype, summed in float32, or in float64 for a float64 prediction.

    Raises:
        ValueError: The shapes do not fit together.
    """
    rows, latent = len(prediction), prediction.shape[1:]
    if tuple(coefficients.shape) != (len(targets), rows) or not targets:
        raise ValueError(
            f"coefficients: expected one row per target and one column per prediction, ({len(targets)}, {rows}), and "
            f"at least one target; got {tuple(coefficients.shape)}"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    scaled = coefficients.to(dtype) * (2 / latent.numel())
    total: Tensor | None = None
    for weights, target in zip(scaled, targets, strict=True):
        term = residual(prediction, target, dtype).mul_(weights.view(rows, *[1] * len(latent)))
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.to(prediction.dtype)


@torch.no_grad()
def mean_absolute_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Computes `mean_N |p - T|` of each row: `(R,)` float32, or float64 for a float64 prediction.

    Arguments are those of `weighted_error_gradient`, with one target.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return residual(prediction, target, dtype).abs_().flatten(1).mean(1, dtype=torch.float64).to(dtype)


def residual(prediction: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `p - T` as new memory, in a dtype to which both are converted first; halves may share the target."""
    rows, latent = len(prediction), prediction.shape[1:]
    if target.shape[1:] != latent or len(target) not in (rows, rows / 2):
        raise ValueError(
            f"target: expected the prediction's shape {tuple(prediction.shape)}, or half as many rows if both halves "
            f"share it; got {tuple(target.shape)}"
        )
    target = target.to(dtype)
    if len(target) == rows:
        return prediction.to(dtype) - target
    return torch.cat([half.to(dtype) - target for half in prediction.chunk(2)])
