"""Paired comparison of two models on the same prompts and seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class PairedDifference:
    """Mean of `other - base` over items, with a normal 95 % interval for it.

    Attributes:
        base: mean score of the base.
        other: mean score of the other model.
        difference: mean paired difference.
        low: lower end of the interval.
        high: upper end of the interval.
        items: number of pairs.
        left_out: number of items that count in none of these, since one of the two models has no score of them.
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
        """The difference with its interval, in words."""
        left_out = f", {self.left_out} without a score left out" if self.left_out else ""
        return f"{self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (95 %, {self.items} pairs{left_out})"

    def __str__(self) -> str:
        return f"{self.base:.3f} -> {self.other:.3f}, difference {self.interval}"


def given(scores: ArrayLike) -> np.ndarray:
    """The scores, any shape -> `(N,)` float64, that are finite: a judge that has none of a picture gives NaN."""
    scores = np.asarray(scores, dtype=np.float64)
    return scores[np.isfinite(scores)]


def paired_difference(base: ArrayLike, other: ArrayLike) -> PairedDifference:
    """Compares scores `(N,)` of two models on the same N items; items with a score that is not finite are left out.

    The interval is mean +- 1.96 standard errors of the paired differences: with the hundreds of items it is meant
    for, that is the t interval. It covers the choice of prompts and seeds of sampling, not of training.

    Raises:
        ValueError: fewer than two items that both have a score of, or numbers of items that differ.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"base, other: two equally long lists of at least 2 scores, got {first.shape}, {second.shape}")
    scored = np.isfinite(first) & np.isfinite(second)
    if scored.sum() < 2:
        raise ValueError(f"base, other: {scored.sum()} of {len(first)} items have a score of both; 2 are needed")
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
