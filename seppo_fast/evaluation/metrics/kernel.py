"""The kernel distance of two sets of feature vectors: the squared maximum mean discrepancy, without bias."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.evaluation.metrics.frechet import Units, check_units, drawn, features_of, normal_interval
from seppo_fast.utils.random import keyed_rng

Groups = tuple[ArrayLike, ArrayLike]  # a number per row of each set, see `kernel_distance`
SUBSETS, SUBSET = 100, 1000  # the usual number and size of random subsets
LARGEST = 6000  # samples of a set up to which three matrices of kernel values take less than 1 GB


def kernel_distance(
    x: ArrayLike,
    y: ArrayLike,
    degree: int = 3,
    subsets: int = SUBSETS,
    subset_size: int | None = None,
    seed: int = 0,
    groups: Groups | None = None,
) -> tuple[float, float]:
    """Computes the squared maximum mean discrepancy of two sets with the kernel (x.y / D + 1)^degree, without bias.

    Known as KID for Inception features (Bińkowski et al. 2018, arXiv 1801.01401). Its expectation for two samples of
    one distribution is 0 at any number of samples, so single values may be negative. That requires that the two samples
    of each pair are independent; see `groups`.

    Args:
        x: features `(N, D)`.
        y: features `(M, D)`.
        degree: the kernel's degree.
        subsets: the number of random subsets.
        subset_size: the samples per subset, drawn without replacement from each set; None: 1000, or all samples of the
            smaller set if it has fewer. If both sets are used whole, there is only one subset.
        seed: seed of the subsets.
        groups: a number per row of each set, `(N,)` and `(M,)`. Pairs of rows with the same number, which are not
            independent, are left out: frames of a clip, and samples of a prompt, real or generated. None: only the
            pairs of a row with itself.

    Returns:
        Mean and (population) standard deviation over the subsets. The deviation is no confidence interval: subsets
        overlap.

    Raises:
        ValueError: as `frechet`, `subsets` or `subset_size` is out of range, or no pairs are left.
    """
    a, b = features_of(x, y)
    most = min(len(a), len(b))
    size = min(SUBSET, most) if subset_size is None else subset_size
    if not 2 <= size <= most or subsets < 1:
        raise ValueError(
            f"subset_size must lie in 2..{most}, subsets must be at least 1; got subset_size = {size}, "
            f"subsets = {subsets}"
        )
    first, second = _numbered(a, b, groups)
    values = []
    for number in range(1 if size == len(a) == len(b) else subsets):
        rng = keyed_rng(seed, "kernel distance", number)
        rows, others = (rng.choice(len(known), size, replace=False) for known in (a, b))
        values.append(discrepancy(a[rows], b[others], degree, (first[rows], second[others])))
    return float(np.mean(values)), float(np.std(values))


def kernel_interval(
    x: ArrayLike,
    y: ArrayLike,
    degree: int = 3,
    *,
    resamples: int = 100,
    seed: int = 0,
    units: Units = (1, 1),
    groups: Groups | None = None,
) -> tuple[float, float]:
    """Returns a 95 % bootstrap interval of the discrepancy of two whole sets, as `frechet_interval` does of a distance.

    Memory: three matrices of kernel values; see `LARGEST`.

    Raises:
        ValueError: as `frechet_interval` and `kernel_distance`.
    """
    a, b = features_of(x, y)
    useful = check_units(resamples, (len(a), units[0]), (len(b), units[1]))
    p, q = _numbered(a, b, groups)
    own_a, own_b, cross = _Pairs(a, a, p, p, degree), _Pairs(b, b, q, q, degree), _Pairs(a, b, p, q, degree)

    def weighted(first: np.ndarray, second: np.ndarray) -> float:
        return own_a.mean(first, first) + own_b.mean(second, second) - 2 * cross.mean(first, second)

    replicates = []
    for number in range(useful):
        rng = keyed_rng(seed, "bootstrap of a kernel distance", number)
        replicates.append(weighted(_times(rng, len(a), units[0]), _times(rng, len(b), units[1])))
    return _interval(weighted(np.ones(len(a)), np.ones(len(b))), replicates)


def kernel_difference(
    real: ArrayLike,
    base: ArrayLike,
    other: ArrayLike,
    degree: int = 3,
    *,
    resamples: int = 100,
    seed: int = 0,
    units: Units = (1, 1),
    groups: Groups | None = None,
) -> tuple[float, float, float]:
    """Computes the discrepancy of `other` minus that of `base` to the same real features, whole sets, with an interval.

    Arguments, pairing and result are those of `frechet_difference`, memory as for `kernel_interval`; `groups` are those
    of the real rows and of either model's, see `kernel_distance`.

    Raises:
        ValueError: as `frechet_difference` and `kernel_distance`.
    """
    x, first = features_of(real, base)
    _, second = features_of(real, other)
    if len(first) != len(second):
        raise ValueError(f"base, other: equally many rows are needed, got {len(first)} and {len(second)}")
    useful = check_units(resamples, (len(x), units[0]), (len(first), units[1]))
    p, q = _numbered(x, first, groups)
    models = [(_Pairs(rows, rows, q, q, degree), _Pairs(x, rows, p, q, degree)) for rows in (first, second)]

    def difference(reals: np.ndarray, rows: np.ndarray) -> float:
        before, after = (own.mean(rows, rows) - 2 * cross.mean(reals, rows) for own, cross in models)
        return after - before  # the real samples' own part cancels

    replicates = []
    for number in range(useful):
        rng = keyed_rng(seed, "bootstrap of a kernel difference", number)
        reals = _times(rng, len(x), units[0])
        replicates.append(difference(reals, _times(rng, len(first), units[1])))
    value = difference(np.ones(len(x)), np.ones(len(first)))
    return (value, *_interval(value, replicates))


def discrepancy(x: ArrayLike, y: ArrayLike, degree: int = 3, groups: Groups | None = None) -> float:
    """Returns the unbiased squared discrepancy of two whole sets (Gretton et al. 2012, eq. 3); see `kernel_distance`.

    Raises:
        ValueError: as `frechet`, or no pairs of independent rows are left.
    """
    a, b = features_of(x, y)
    p, q = _numbered(a, b, groups)
    first, second = np.ones(len(a)), np.ones(len(b))
    own = _Pairs(a, a, p, p, degree).mean(first, first) + _Pairs(b, b, q, q, degree).mean(second, second)
    value = own - 2 * _Pairs(a, b, p, q, degree).mean(first, second)
    if not np.isfinite(value):
        raise ValueError("samples of at least two prompts, or two clips, are needed on both sides")
    return value


def _numbered(a: np.ndarray, b: np.ndarray, groups: Groups | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the groups of two sets, numbered from 0; without groups, each row has its own."""
    first, second = (np.arange(len(a)), len(a) + np.arange(len(b))) if groups is None else map(np.asarray, groups)
    if first.shape != (len(a),) or second.shape != (len(b),):
        raise ValueError(f"groups: expected {len(a)} and {len(b)} numbers, got {first.shape} and {second.shape}")
    numbers = np.unique(np.concatenate([first, second]), return_inverse=True)[1]
    return numbers[: len(a)], numbers[len(a) :]


class _Pairs:
    """The kernel values (x.y / D + 1)^degree of all pairs of rows from different groups."""

    def __init__(self, x: np.ndarray, y: np.ndarray, first: np.ndarray, second: np.ndarray, degree: int) -> None:
        base = x @ y.T / x.shape[1] + 1
        self._values = reduce(np.multiply, [base] * degree)  # many times faster than `**`
        self._values[np.equal.outer(first, second)] = 0
        self._first, self._second, self._groups = first, second, int(max(first.max(), second.max())) + 1

    def mean(self, first: np.ndarray, second: np.ndarray) -> float:
        """Returns the mean if row i is drawn `first[i]` or `second[i]` times; NaN if no pairs are drawn."""
        sides = ((self._first, first), (self._second, second))
        drawn_of = [np.bincount(numbers, times, self._groups) for numbers, times in sides]
        count = first.sum() * second.sum() - drawn_of[0] @ drawn_of[1]
        return float(first @ self._values @ second / count) if count else math.nan


def _interval(centre: float, replicates: list[float]) -> tuple[float, float]:
    """Returns `normal_interval` of the resamples in which pairs of independent rows were drawn."""
    return normal_interval(centre, [value for value in replicates if np.isfinite(value)])


def _times(rng: np.random.Generator, count: int, unit: int) -> np.ndarray:
    """Draws how often each row occurs in a resample, whose kernel values are those of the whole set, repeated."""
    return np.bincount(drawn(rng, count, unit), minlength=count).astype(np.float64)
