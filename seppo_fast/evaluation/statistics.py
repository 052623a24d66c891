"""Paired comparison of two models on the same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `other - base` over items, with a normal 95 % confidence interval.

    Attributes:
        base: mean score of the base.
        other: mean score of the other model.
        difference: mean paired difference.
        low: lower end of the interval.
        high: upper end of the interval.
        items: number of pairs.
        left_out: number of items that are excluded from all of these because a model has no score for them.
    """

    base: float
    other: float
    difference: float
    low: float
    high: float
    items: int
    left_out: int = 0

    @property
    def interval(self) -> str:
        """The difference and its interval as text."""
        left_out = f", {self.left_out} without a score left out" if self.left_out else ""
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (95 %, {self.items} pairs{left_out})"

    def __str__(self) -> str:
        return f"{self.base:.3f} -> {self.other:.3f}, difference {self.interval}"


def given(scores: ArrayLike) -> np.ndarray:
    """Returns the finite ones of scores of any shape as `(N,)` float64; NaN means that a judge gave no score."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores[np.isfinite(scores)]


def paired_difference(base: ArrayLike, other: ArrayLike) -> PairedDifference:
    """Compares scores `(N,)` of two models on the same N items; items with a non-finite score are left out.

    The interval is mean +- 1.96 standard errors of the paired differences; with hundreds of items, as intended, it is
    practically the t interval. It covers the choice of prompts and sampling seeds, not of training seeds.

    Raises:
        ValueError: the numbers of items differ, or fewer than two items have a score from both models.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            f"base, other: expected two equally long lists of at least 2 scores, got shapes {first.shape} and "
            f"{second.shape}"
        )
    scored = np.isfinite(first) & np.isfinite(second)
    if scored.sum() < 2:
        raise ValueError(
            f"base, other: {scored.sum()} of {len(first)} items have a score from both models; at least 2 are needed"
        )
    left_out = len(first) - int(scored.sum())
    first, second = first[scored], second[scored]
    differences = second - first
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences))
    mean = differences.mean()
    return PairedDifference(
        base=float(first.mean()),
        other=float(second.mean()),
        difference=float(mean),
        low=float(mean - half),
        high=float(mean + half),
        items=len(first),
        left_out=left_out,
    )


def wilson(wins: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval for a share of `wins` among `n` trials (Wilson 1927); (0, 1) if n is 0.

    Raises:
        ValueError: `wins` is not between 0 and `n`, or `confidence` not between 0 and 1.
    """
    if not 0 <= wins <= n < np.inf or not 0 < confidence < 1:
        raise ValueError(
            f"wins, n, confidence: expected 0 <= wins <= n and 0 < confidence < 1, got {wins}, {n}, {confidence}"
        )
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = wins / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = float(np.sqrt(share * (1 - share) * spread + spread**2 / 4)) / (1 + spread)
    # At 0 and n wins one end is exactly 0 or 1, which rounding would miss.
    return (0.0 if wins == 0 else centre - half), (1.0 if wins == n else centre + half)
