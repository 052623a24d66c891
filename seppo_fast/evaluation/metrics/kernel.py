"""The kernel distance of two sets of feature vectors: the squared maximum mean discrepancy, without bias."""

from __future__ import annotations

from functools import reduce

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.evaluation.metrics.frechet import Units, check_units, drawn, features_of, normal_interval
from seppo_fast.utils.random import keyed_rng

LARGEST = 6000  # samples of a set up to which three matrices of kernel values take less than 1 GB


def kernel_distance(
    x: ArrayLike, y: ArrayLike, degree: int = 3, subsets: int = 100, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Computes the squared maximum mean discrepancy of two sets with the kernel (x.y / D + 1)^degree, without bias.

    Known as KID for Inception features (Bińkowski et al. 2018, arXiv 1801.01401). Its expectation for two samples of
    one distribution is 0 at any number of samples, so single values may be negative.

    Args:
        x: features `(N, D)`.
        y: features `(M, D)`.
        degree: the kernel's degree.
        subsets: the number of random subsets.
        subset_size: the samples per subset, drawn without replacement from each set; None: 1000, or all samples of the
            smaller set if it has fewer. If both sets are used whole, there is only one subset.
        seed: seed of the subsets.

    Returns:
        Mean and (population) standard deviation over the subsets. The deviation is no confidence interval: subsets
        overlap.

    Raises:
        ValueError: as `frechet`, or `subsets` or `subset_size` is out of range.
    """
    a, b = features_of(x, y)
    most = min(len(a), len(b))
    size = min(1000, most) if subset_size is None else subset_size
    if not 2 <= size <= most or subsets < 1:
        raise ValueError(
            f"subset_size must lie in 2..{most}, subsets must be at least 1; got subset_size = {size}, "
            f"subsets = {subsets}"
        )
    values = []
    for number in range(1 if size == len(a) == len(b) else subsets):
        rng = keyed_rng(seed, "kernel distance", number)
        first, second = (rows[rng.choice(len(rows), size, replace=False)] for rows in (a, b))
        values.append(discrepancy(first, second, degree))
    return float(np.mean(values)), float(np.std(values))


def kernel_interval(
    x: ArrayLike, y: ArrayLike, degree: int = 3, *, resamples: int = 100, seed: int = 0, units: Units = (1, 1)
) -> tuple[float, float]:
    """Returns a 95 % bootstrap interval of the discrepancy of two whole sets, as `frechet_interval` does of a distance.

    Memory: three matrices of kernel values; see `LARGEST`.

    Raises:
        ValueError: as `frechet_interval`.
    """
    a, b = features_of(x, y)
    check_units(resamples, (len(a), units[0]), (len(b), units[1]))
    own_a, own_b, cross = _kernel(a, a, degree), _kernel(b, b, degree), _kernel(a, b, degree)

    def weighted(first: np.ndarray, second: np.ndarray) -> float:
        return _own(own_a, first) + _own(own_b, second) - 2 * _cross(cross, first, second)

    replicates = []
    for number in range(resamples):
        rng = keyed_rng(seed, "bootstrap of a kernel distance", number)
        replicates.append(weighted(_times(rng, len(a), units[0]), _times(rng, len(b), units[1])))
    return normal_interval(weighted(np.ones(len(a)), np.ones(len(b))), replicates)


def kernel_difference(
    real: ArrayLike,
    base: ArrayLike,
    other: ArrayLike,
    degree: int = 3,
    *,
    resamples: int = 100,
    seed: int = 0,
    units: Units = (1, 1),
) -> tuple[float, float, float]:
    """Computes the discrepancy of `other` minus that of `base` to the same real features, whole sets, with an interval.

    Arguments, pairing and result are those of `frechet_difference`, memory as for `kernel_interval`.

    Raises:
        ValueError: as `frechet_difference`.
    """
    x, first = features_of(real, base)
    _, second = features_of(real, other)
    if len(first) != len(second):
        raise ValueError(f"base, other: equally many rows are needed, got {len(first)} and {len(second)}")
    check_units(resamples, (len(x), units[0]), (len(first), units[1]))
    models = [(_kernel(rows, rows, degree), _kernel(x, rows, degree)) for rows in (first, second)]

    def difference(reals: np.ndarray, rows: np.ndarray) -> float:
        before, after = (_own(own, rows) - 2 * _cross(cross, reals, rows) for own, cross in models)
        return after - before  # the real samples' own part cancels

    replicates = []
    for number in range(resamples):
        rng = keyed_rng(seed, "bootstrap of a kernel difference", number)
        reals = _times(rng, len(x), units[0])
        replicates.append(difference(reals, _times(rng, len(first), units[1])))
    value = difference(np.ones(len(x)), np.ones(len(first)))
    return (value, *normal_interval(value, replicates))


def discrepancy(x: ArrayLike, y: ArrayLike, degree: int = 3) -> float:
    """Returns the unbiased squared discrepancy of two whole sets (Gretton et al. 2012, eq. 3); see `kernel_distance`.

    Raises:
        ValueError: as `frechet`.
    """
    a, b = features_of(x, y)
    first, second = np.ones(len(a)), np.ones(len(b))
    own = _own(_kernel(a, a, degree), first) + _own(_kernel(b, b, degree), second)
    return own - 2 * _cross(_kernel(a, b, degree), first, second)


def _kernel(x: np.ndarray, y: np.ndarray, degree: int) -> np.ndarray:
    """Returns (x.y / D + 1)^degree for all pairs of rows, by multiplication, which is many times faster than `**`."""
    base = x @ y.T / x.shape[1] + 1
    return reduce(np.multiply, [base] * degree)


def _own(kernel: np.ndarray, times: np.ndarray) -> float:
    """Returns the mean over pairs of different samples, of which sample i is drawn `times[i]` times."""
    count = times.sum()
    return float((times @ kernel @ times - times @ kernel.diagonal()) / (count * (count - 1)))


def _cross(kernel: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ kernel @ second / (first.sum() * second.sum()))


def _times(rng: np.random.Generator, count: int, unit: int) -> np.ndarray:
    """Draws how often each row occurs in a resample, whose kernel values are those of the whole set, repeated."""
    return np.bincount(drawn(rng, count, unit), minlength=count).astype(np.float64)
