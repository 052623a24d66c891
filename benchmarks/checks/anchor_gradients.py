"""Compares two mean gradients and estimates how much of each is noise, by measuring each on two halves of the pairs.

Let g = (a + b) / 2, where a and b are the mean gradients on two disjoint halves of the pairs. Then |g|^2 includes the
variance of the mean over draws and pairs, but a . b does not: its expectation is the squared norm of the expected
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Gradient = list[Tensor]
"""One tensor per trained weight, float32 on the CPU."""


class Halves(NamedTuple):
    """A mean gradient on the pairs at even positions and on those at odd positions."""

    first: Gradient
    second: Gradient


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Returns the inner product of two lists of tensors, summed in float64."""
    return sum(float((first.double() * second.double()).sum()) for first, second in zip(one, other, strict=True))


def size(gradient: Halves) -> dict[str, Any]:
    """Returns the norm of a gradient over all pairs, and how well its two halves agree.

    Returns:
        `norm`; `norm_without_noise`, which is sqrt(a . b), or None if a . b is not positive; `cosine_of_halves`, which
        is near 1 if noise does not dominate.
    """
    a, b = gradient
    aa, bb, ab = dot(a, a), dot(b, b), dot(a, b)
    return {
        "norm": ((aa + 2 * ab + bb) / 4) ** 0.5,
        "norm_without_noise": ab**0.5 if ab > 0 else None,
        "cosine_of_halves": _ratio(ab, (aa * bb) ** 0.5),
    }


def comparison(winners: Halves, others: Halves) -> dict[str, Any]:
    """Returns the ratio |others| / |winners| and the cosine of two gradients.

    Returns:
        `ratio` and `cosine` over all pairs; `ratio_of_halves` and `cosine_of_halves`, the same for each half alone;
        `ratio_without_noise` and `cosine_without_noise`, computed from products across the halves only (which also
        removes the noise of draws that both gradients share), or None if noise is too large for an estimate.
    """
    same = [(dot(w, w), dot(o, o), dot(w, o)) for w, o in zip(winners, others, strict=True)]
    crossed = dot(winners.first, winners.second), dot(others.first, others.second)
    between = (dot(winners.first, others.second) + dot(winners.second, others.first)) / 2
    whole = [(same[0][i] + same[1][i] + 2 * cross) / 4 for i, cross in enumerate((*crossed, between))]
    clean = min(crossed) > 0
    return {
        "ratio": _ratio(whole[1], whole[0], 0.5),
        "cosine": _ratio(whole[2], (whole[0] * whole[1]) ** 0.5),
        "ratio_of_halves": [_ratio(oo, ww, 0.5) for ww, oo, _ in same],
        "cosine_of_halves": [_ratio(wo, (ww * oo) ** 0.5) for ww, oo, wo in same],
        "ratio_without_noise": _ratio(crossed[1], crossed[0], 0.5) if clean else None,
        "cosine_without_noise": _ratio(between, (crossed[0] * crossed[1]) ** 0.5) if clean else None,
    }


def _ratio(above: float, below: float, power: float = 1.0) -> float | None:
    return (above / below) ** power if below else None
