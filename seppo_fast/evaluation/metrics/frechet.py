"""Distances between two sets of feature vectors, with what is needed to read them: floors, intervals, warnings.

The Fréchet distance of few samples is mostly bias: it is far from 0 for two samples of the same distribution. Never
report it without the number of samples and the distance of real samples to other real samples (`real_floor`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.utils.random import keyed_rng

Moments = tuple[np.ndarray, np.ndarray]  # a mean (D,) and a root of a covariance, see `_moments`
SAMPLES_PER_DIMENSION = 10  # with fewer, `Distance` warns


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance with the numbers that it must be read with.

    Attributes:
        value: the distance of the generated samples to the real ones.
        low: lower end of its 95 % interval, see `frechet_interval`.
        high: upper end.
        floor: the distance of `floor_items` real samples to as many other real ones.
        floor_items: the number of real samples on each side of the floor; at most half of all real samples.
        real: number of real samples.
        generated: number of generated samples.
        dimensions: number of features.
    """

    value: float
    low: float
    high: float
    floor: float
    floor_items: int
    real: int
    generated: int
    dimensions: int

    @property
    def warning(self) -> str:
        """A sentence for a distance of too few samples; empty if there are enough."""
        needed, fewest = SAMPLES_PER_DIMENSION * self.dimensions, min(self.real, self.generated)
        if fewest >= needed:
            return ""
        return (
            f"{fewest} samples are few for {self.dimensions} features (at least {needed} are recommended): most of "
            f"{self.value:.4g} may be bias; real samples are {self.floor:.4g} from other real samples "
            f"({self.floor_items} each). Compare only values of equally many samples"
        )


def compare(real: ArrayLike, generated: ArrayLike, *, resamples: int = 100, seed: int = 0) -> Distance:
    """Computes the Fréchet distance of generated to real features, with its floor and interval.

    Args:
        real: features `(R, D)`, R at least 4.
        generated: features `(G, D)`, G at least 2.
        resamples: the number of bootstrap samples for the interval; each costs as much as the distance.
        seed: seed of the floor and the bootstrap.

    Raises:
        ValueError: as `frechet`, or `real` is too short.
    """
    x, y = _features(real, generated)
    items = min(len(y), len(x) // 2)
    low, high = frechet_interval(x, y, resamples=resamples, seed=seed)
    floor = real_floor(x, items, seed)
    return Distance(frechet(x, y), low, high, floor, items, len(x), len(y), x.shape[1])


def frechet(x: ArrayLike, y: ArrayLike, ddof: int = 1) -> float:
    """Computes the Fréchet distance of two Gaussians with the samples' means and covariances.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6). With S1 = A^T A and
    S2 = B^T B, the eigenvalues of S1 S2 are the squared singular values of A B^T. So the trace of the square root is
    the nuclear norm of A B^T, which is exact for singular covariances, too, where a matrix square root is not. A holds
    the centred samples, or their triangular factor if there are more samples than features. All is in float64.

    Args:
        x: features `(N, D)`, N at least 2.
        y: features `(M, D)`, M at least 2.
        ddof: the covariances are sums divided by N - ddof; 1 as in FID and FVD, 0 as in ChronoMagic-Bench's UMT-FVD.

    Returns:
        The distance, at least 0; it is squared in the units of the features, as in all publications.

    Raises:
        ValueError: the shapes do not match, a set has less than two samples, or a feature is non-finite.
    """
    a, b = _features(x, y)
    return _distance(_moments(a, ddof), _moments(b, ddof))


def real_floor(x: ArrayLike, n: int, seed: int) -> float:
    """Computes the Fréchet distance of two disjoint random subsets of the real features, `n` samples each.

    Args:
        x: real features `(R, D)`, R at least 4.
        n: the number of samples whose distance is to be read. If R < 2 n, subsets of R // 2 are used, with a warning:
            their distance overstates the floor at `n`.
        seed: seed of the subsets.

    Raises:
        ValueError: as `frechet`, or `n` is less than 2, or R less than 4.
    """
    features, _ = _features(x, x)
    if n < 2 or len(features) < 4:
        raise ValueError(f"n, x: at least 2 samples per subset are needed, got n = {n} and {len(features)} samples")
    items = min(n, len(features) // 2)
    if items < n:
        warnings.warn(
            f"the floor is measured at {items} samples instead of {n}, because there are only {len(features)} real "
            f"ones; it overstates the floor at {n}",
            RuntimeWarning,
            stacklevel=2,
        )
    order = keyed_rng(seed, "real floor").permutation(len(features))
    return frechet(features[order[:items]], features[order[items : 2 * items]])


def frechet_interval(
    x: ArrayLike, y: ArrayLike, *, resamples: int = 100, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Returns a bootstrap interval of the Fréchet distance: it covers the choice of samples, not the bias.

    Both sets are resampled with replacement. A resample repeats samples, which increases the bias, so percentiles would
    lie above the distance itself. Only the replicates' standard deviation is used: the interval is the distance plus
    and minus a normal quantile times it. With fewer samples than features the interval is too wide.

    Args:
        x: features `(N, D)`.
        y: features `(M, D)`.
        resamples: the number of bootstrap samples.
        seed: seed of the bootstrap.
        confidence: the interval's nominal coverage.

    Raises:
        ValueError: as `frechet`, or `resamples` is less than 2.
    """
    a, b = _features(x, y)
    _check_resamples(resamples)
    replicates = []
    for number in range(resamples):
        rng = keyed_rng(seed, "bootstrap of a distance", number)
        replicates.append(frechet(a[_drawn(rng, len(a))], b[_drawn(rng, len(b))]))
    return _normal_interval(frechet(a, b), replicates, confidence)


def frechet_difference(
    real: ArrayLike,
    base: ArrayLike,
    other: ArrayLike,
    *,
    resamples: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Computes the Fréchet distance of `other` minus that of `base` to the same real features, with an interval.

    Row i of both models belongs to the same prompt and seed; each resample draws the same rows of both. Bias that both
    models share cancels.

    Args:
        real: features `(R, D)`.
        base: features `(N, D)` of the base model.
        other: features `(N, D)` of the other model.
        resamples: the number of bootstrap samples.
        seed: seed of the bootstrap.
        confidence: the interval's nominal coverage.

    Returns:
        The difference (negative: `other` is closer to the real samples) and the ends of its interval.

    Raises:
        ValueError: as `frechet_interval`, or the models have different numbers of samples.
    """
    x, first = _features(real, base)
    _, second = _features(real, other)
    if len(first) != len(second):
        raise ValueError(f"base, other: equally many rows are needed, got {len(first)} and {len(second)}")
    _check_resamples(resamples)
    replicates = []
    for number in range(resamples):
        rng = keyed_rng(seed, "bootstrap of a difference", number)
        drawn, rows = _moments(x[_drawn(rng, len(x))]), _drawn(rng, len(first))
        replicates.append(_distance(drawn, _moments(second[rows])) - _distance(drawn, _moments(first[rows])))
    difference = frechet(x, second) - frechet(x, first)
    return (difference, *_normal_interval(difference, replicates, confidence))


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
    a, b = _features(x, y)
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
        values.append(_squared_discrepancy(first, second, degree))
    return float(np.mean(values)), float(np.std(values))


def _squared_discrepancy(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    """Returns the unbiased estimate (Gretton et al. 2012, eq. 3) for two equally long sets."""
    n, d = x.shape
    own = 0.0
    for rows in (x, y):
        kernel = (rows @ rows.T / d + 1) ** degree
        own += (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
    return float(own - 2 * np.mean((x @ y.T / d + 1) ** degree))


def _distance(first: Moments, second: Moments) -> float:
    (mean_a, root_a), (mean_b, root_b) = first, second
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross
    return float(max(distance, 0.0))  # rounding makes the distance of equal sets slightly negative


def _moments(x: np.ndarray, ddof: int = 1) -> Moments:
    """Returns the mean `(D,)` and a matrix A with A^T A = covariance, `(min(N, D), D)`."""
    mean = x.mean(axis=0)
    centred = (x - mean) / np.sqrt(len(x) - ddof)
    return mean, np.asarray(np.linalg.qr(centred, mode="r")) if len(x) > x.shape[1] else centred


def _features(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2 or a.shape[1] < 1:
        raise ValueError(
            f"x, y: expected features (N, D) and (M, D) with N, M at least 2, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("x, y: features must be finite")
    return a, b


def _check_resamples(resamples: int) -> None:
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")


def _drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws `count` of `count` rows with replacement, at least two different ones."""
    rows = rng.integers(count, size=count)
    if (rows == rows[0]).all():
        rows[0] = (rows[0] + 1) % count
    return rows


def _normal_interval(centre: float, replicates: list[float], confidence: float) -> tuple[float, float]:
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(replicates, ddof=1))
    return centre - half, centre + half
