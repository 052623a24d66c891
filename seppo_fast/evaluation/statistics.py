"""Statistics of paired comparisons: two models on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.utils.random import keyed_rng

DRAWS = 10_000  # of the bootstrap and of the sign-flip test
_AT_ONCE = 1 << 20  # random numbers that are held at once
_EXPANDED = 10_000  # degrees of freedom above which t quantiles are expanded about the normal ones
_EXACT = 12  # with at most so many non-zero differences, the sign-flip test goes through all signs


@dataclass(frozen=True)
class PairedDifference:
    """The mean of `other - base` over items, with a 95 % t interval.

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

    The interval is the t interval of the mean of N independent paired differences: mean +- `t_quantile(0.975, N - 1)`
    standard errors. It is exact if the differences are normal. It covers the choice of prompts and sampling seeds, not
    of training seeds.

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
    half = t_quantile(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
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


def t_quantile(probability: float, freedom: int) -> float:
    """Returns the value below which a t-distributed variable is with a probability.

    Bisects the finite series of P(|T| <= t) for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and
    26.7.4). Above 10,000 degrees it is the expansion 26.7.5 about the normal quantile, whose next term is below 1e-11
    at 95 %.

    Args:
        probability: the probability, between 0.5 and 1.
        freedom: the degrees of freedom, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(f"probability, freedom: need 0.5 <= p < 1 and at least 1 degree, got {probability, freedom}")
    if freedom > _EXPANDED:
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    odd = freedom % 2
    powers = np.arange(odd, freedom - 1, 2)  # of the cosine
    terms = np.cumprod([1.0, *((powers[1:] - 1) / powers[1:])])[: len(powers)]
    low, high = 0.0, np.pi / 2  # ends for the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        angle = (low + high) / 2
        inside = np.sin(angle) * (terms @ np.cos(angle) ** powers)
        inside = 2 / np.pi * (angle + inside) if odd else inside
        low, high = (angle, high) if inside < 2 * probability - 1 else (low, angle)
    return float(np.tan((low + high) / 2) * np.sqrt(freedom))


@dataclass(frozen=True)
class WinRate:
    """How often a model scores higher than the base.

    Attributes:
        wins: number of items with a higher score.
        ties: number of items with exactly equal scores.
        losses: number of items with a lower score.
        rate: (wins + ties / 2) / items.
        low: lower end of the Wilson interval of wins / (wins + losses), that is, without ties; 0 if all are ties.
        high: upper end; 1 if all are ties.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


def cluster(prompts: Sequence[str], scores: ArrayLike) -> np.ndarray:
    """Returns the mean score `(P,)` float64 of each of the P distinct prompts, in sorted order.

    Prompts are independent, but samples of the same prompt are not, nor are duplicates of a prompt.

    Args:
        prompts: the N prompts.
        scores: their scores `(N,)`; a prompt with a NaN among its scores gets NaN.
    """
    places = {prompt: place for place, prompt in enumerate(sorted(set(prompts)))}
    rows = [places[prompt] for prompt in prompts]
    return np.bincount(rows, np.asarray(scores, dtype=np.float64)) / np.bincount(rows)


def wilson(wins: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Returns Wilson's score interval (1927, equation 5 of Brown, Cai and DasGupta 2001) for a share of wins.

    Args:
        wins: the number of wins, from 0 to `n`.
        n: the number of trials.
        confidence: the confidence level, between 0 and 1.

    Returns:
        The ends of the interval; (0, 1) for no trials.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= wins <= n < np.inf or not 0 < confidence < 1:
        raise ValueError(f"wins, n, confidence: need 0 <= wins <= n and 0 < confidence < 1, got {wins, n, confidence}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, scale = wins / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    half = z / scale * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends the exact values are 0 and 1.
    return 0.0 if wins == 0 else middle - half, 1.0 if wins == n else middle + half


def win_rate(differences: ArrayLike) -> WinRate:
    """Counts wins, ties (exactly 0) and losses among differences `(N,)`; non-finite ones are left out.

    Raises:
        ValueError: no difference is finite.
    """
    found = given(differences)
    if not len(found):
        raise ValueError("differences: none of them is finite")
    wins, losses = int((found > 0).sum()), int((found < 0).sum())
    ties = len(found) - wins - losses
    low, high = wilson(wins, wins + losses)
    return WinRate(wins, ties, losses, (wins + ties / 2) / len(found), low, high)


def bootstrap(values: ArrayLike, draws: int = DRAWS, seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean of independent values `(N,)`, drawn from the seed.

    Raises:
        ValueError: there are no values, or one is non-finite.
    """
    found = _finite(values)
    rng, means = keyed_rng(seed, "bootstrap", len(found)), np.empty(draws)
    step = max(1, _AT_ONCE // len(found))
    for start in range(0, draws, step):
        rows = rng.integers(len(found), size=(min(step, draws - start), len(found)))
        means[start : start + step] = found[rows].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def sign_flip(differences: ArrayLike, draws: int = DRAWS, seed: int = 0) -> float:
    """Returns the two-sided p-value of the sign-flip test that differences `(N,)` are symmetric about 0.

    With at most 12 non-zero differences all signs are tried; else `draws` random ones, and p = (1 + hits) / (1 + draws)
    (Phipson and Smyth 2010).

    Raises:
        ValueError: there are no differences, or one is non-finite.
    """
    found = _finite(differences)
    found = found[found != 0]  # a tie has no sign to flip
    if not len(found):
        return 1.0
    # Sums of the same numbers in another order may differ by rounding.
    most = abs(found.sum()) - 1e-12 * np.abs(found).sum()
    if len(found) <= _EXACT:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(found))))
        return float((np.abs(signs @ found) >= most).mean())
    rng, hits = keyed_rng(seed, "sign flip", len(found)), 0
    step = max(1, _AT_ONCE // len(found))
    for start in range(0, draws, step):
        signs = 2.0 * rng.integers(2, size=(min(step, draws - start), len(found))) - 1
        hits += int((np.abs(signs @ found) >= most).sum())
    return (1 + hits) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for their number with Holm's method (1979), in the given order.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p_values: must be between 0 and 1, got {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Returns Spearman's rank correlation of paired values `(N,)`; equal values share their mean rank.

    Pairs with a non-finite value are left out. The result is NaN if fewer than two pairs remain or a side is constant.

    Raises:
        ValueError: the shapes differ or are not `(N,)`.
    """
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"x, y: expected two equally long lists, got shapes {first.shape} and {second.shape}")
    both = np.isfinite(first) & np.isfinite(second)
    one, other = _ranks(first[both]), _ranks(second[both])
    if both.sum() < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, rows, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[rows]


def _finite(values: ArrayLike) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"expected a list of at least one finite value, got shape {found.shape}")
    return found
