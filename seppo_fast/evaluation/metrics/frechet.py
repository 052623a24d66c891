"""The Fréchet distance of two sets of feature vectors, with what is needed to read it: floors, intervals, warnings.

The Fréchet distance of few samples is mostly bias: it is far from 0 for two samples of the same distribution. Never
report it without the number of samples and the distance of real samples to other real samples (`real_floor`).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.utils.random import keyed_rng

Moments = tuple[np.ndarray, np.ndarray]  # a mean (D,) and a root of a covariance, see `_moments`
Units = tuple[int, int]  # how many consecutive rows of each set belong together: a clip's frames, a prompt's samples
SAMPLES_PER_DIMENSION = 10  # with fewer, `Distance` warns
_RESAMPLES, _FEWEST_RESAMPLES = 100, 20
_CHEAP = 512  # samples or features up to which a distance takes a fraction of a second


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance with the numbers that it must be read with.

    Attributes:
        value: the distance of the generated samples to the real ones.
        low: lower end of its 95 % interval, see `frechet_interval`; NaN without one.
        high: upper end.
        floor: the distance of `floor_items` real samples to all other real ones.
        floor_items: as many real samples as generated ones, but at most half of all real samples.
        floor_others: the number of the other real samples.
        real: number of real samples.
        generated: number of generated samples.
        dimensions: number of features.
        frames: how many samples are frames of one clip, which are not independent.
    """

    value: float
    low: float
    high: float
    floor: float
    floor_items: int
    floor_others: int
    real: int
    generated: int
    dimensions: int
    frames: int = 1

    @property
    def warning(self) -> str:
        """A sentence for a distance of too few samples; empty if there are enough."""
        needed, fewest = SAMPLES_PER_DIMENSION * self.dimensions, min(self.real, self.generated) // self.frames
        if fewest >= needed:
            return ""
        items = "samples" if self.frames == 1 else f"clips of {self.frames} frames"
        few = ", too few: the floor at the generated number is lower" if self.floor_items < self.generated else ""
        return (
            f"{fewest} {items} are few for {self.dimensions} features (at least {needed} are recommended): most of "
            f"{self.value:.4g} may be bias; real samples are {self.floor:.4g} from other real samples "
            f"({self.floor_items} against {self.floor_others}{few}). Compare only values of equally many samples"
        )


def resamples_for(real: int, generated: int, dimensions: int) -> int:
    """Returns the number of bootstrap samples that is affordable for sets of this size.

    A distance costs the cube of its rank: the number of features, or of samples in the larger set if that is smaller.
    Up to a rank of 512 there are 100 bootstrap samples; above, fewer in proportion to the cube, but at least 20, from
    which the half width of an interval is known to about 16 %.

    Args:
        real: the number of real samples.
        generated: the number of generated samples.
        dimensions: the number of features.
    """
    rank = max(min(max(real, generated), dimensions), _CHEAP)
    return max(_FEWEST_RESAMPLES, round(_RESAMPLES * (_CHEAP / rank) ** 3))


def compare(
    real: ArrayLike,
    generated: ArrayLike,
    *,
    resamples: int = 100,
    seed: int = 0,
    units: Units = (1, 1),
    frames: int = 1,
) -> Distance:
    """Computes the Fréchet distance of generated to real features, with its floor and interval.

    Args:
        real: features `(R, D)`, R at least 4.
        generated: features `(G, D)`, G at least 2.
        resamples: the number of bootstrap samples for the interval; each costs as much as the distance.
        seed: seed of the floor and the bootstrap.
        units: how many consecutive rows of either set belong together; see `frechet_interval`.
        frames: how many rows are frames of one clip.

    Raises:
        ValueError: as `frechet`, or `real` is too short.
    """
    x, y = features_of(real, generated)
    items = min(len(y), len(x) // (2 * units[0]) * units[0])
    low, high = frechet_interval(x, y, resamples=resamples, seed=seed, units=units)
    floor = real_floor(x, items, seed, units[0])
    items = items // units[0] * units[0]
    return Distance(frechet(x, y), low, high, floor, items, len(x) - items, len(x), len(y), x.shape[1], frames)


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
    a, b = features_of(x, y)
    return _distance(_moments(a, ddof), _moments(b, ddof))


def real_floor(x: ArrayLike, n: int, seed: int, unit: int = 1) -> float:
    """Computes the Fréchet distance of `n` random real samples to all other real samples.

    Its bias is that of the distance of `n` generated samples to R - `n` real ones: slightly more than to all R.

    Args:
        x: real features `(R, D)`, R at least 4.
        n: the number of generated samples whose distance is to be read. If R < 2 n, half of the samples are used, with
            a warning: their distance overstates the floor at `n`.
        seed: seed of the choice.
        unit: how many consecutive rows belong together and are in the same subset; `n` is rounded down to a multiple.

    Raises:
        ValueError: as `frechet`, or `n` is less than 2, or R less than 4, or R is no multiple of `unit`.
    """
    features, _ = features_of(x, x)
    check_units(2, (len(features), unit))
    if n < max(2, unit) or len(features) < max(4, 2 * unit):
        raise ValueError(f"n, x: at least 2 samples per subset are needed, got n = {n} and {len(features)} samples")
    items = min(n // unit, len(features) // unit // 2) * unit
    if items < n // unit * unit:
        warnings.warn(
            f"the floor is measured at {items} samples instead of {n}, because there are only {len(features)} real "
            f"ones; it overstates the floor at {n}",
            RuntimeWarning,
            stacklevel=2,
        )
    order = _rows(keyed_rng(seed, "real floor").permutation(len(features) // unit), unit)
    return frechet(features[order[:items]], features[order[items:]])


def frechet_interval(
    x: ArrayLike,
    y: ArrayLike,
    *,
    resamples: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
    units: Units = (1, 1),
) -> tuple[float, float]:
    """Returns a bootstrap interval of the Fréchet distance: it covers the choice of samples, not the bias.

    Both sets are resampled with replacement. A resample repeats samples, which increases the bias, so percentiles would
    lie above the distance itself. Only the replicates' standard deviation is used: the interval is the distance plus
    and minus a normal quantile times it. With fewer samples than features the interval is too wide. A set with a single
    unit has no spread: both ends are NaN.

    Args:
        x: features `(N, D)`.
        y: features `(M, D)`.
        resamples: the number of bootstrap samples.
        seed: seed of the bootstrap.
        confidence: the interval's nominal coverage.
        units: how many consecutive rows of `x`, and of `y`, belong together and are drawn together, such as the frames
            of a clip or the samples of a prompt, which are not independent.

    Raises:
        ValueError: as `frechet`, or `resamples` is less than 2, or N or M is no multiple of its unit.
    """
    a, b = features_of(x, y)
    replicates = []
    for number in range(check_units(resamples, (len(a), units[0]), (len(b), units[1]))):
        rng = keyed_rng(seed, "bootstrap of a distance", number)
        replicates.append(frechet(a[drawn(rng, len(a), units[0])], b[drawn(rng, len(b), units[1])]))
    return normal_interval(frechet(a, b), replicates, confidence)


def frechet_difference(
    real: ArrayLike,
    base: ArrayLike,
    other: ArrayLike,
    *,
    resamples: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
    units: Units = (1, 1),
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
        units: as in `frechet_interval`, of `real` and of either model.

    Returns:
        The difference (negative: `other` is closer to the real samples) and the ends of its interval.

    Raises:
        ValueError: as `frechet_interval`, or the models have different numbers of samples.
    """
    x, first = features_of(real, base)
    _, second = features_of(real, other)
    if len(first) != len(second):
        raise ValueError(f"base, other: equally many rows are needed, got {len(first)} and {len(second)}")
    replicates = []
    for number in range(check_units(resamples, (len(x), units[0]), (len(first), units[1]))):
        rng = keyed_rng(seed, "bootstrap of a difference", number)
        reals, rows = _moments(x[drawn(rng, len(x), units[0])]), drawn(rng, len(first), units[1])
        replicates.append(_distance(reals, _moments(second[rows])) - _distance(reals, _moments(first[rows])))
    difference = frechet(x, second) - frechet(x, first)
    return (difference, *normal_interval(difference, replicates, confidence))


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


def features_of(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns two sets of features as float64; raises ValueError for a wrong shape, too few rows or non-finite ones."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1:] != b.shape[1:] or min(len(a), len(b)) < 2 or a.shape[1] < 1:
        raise ValueError(
            f"x, y: expected features (N, D) and (M, D) with N, M at least 2, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("x, y: features must be finite")
    return a, b


def check_units(resamples: int, *sets: tuple[int, int]) -> int:
    """Returns the number of useful resamples: 0 if a set has only one unit, so that all would be the same.

    Raises:
        ValueError: there are too few resamples, or the rows of a set cannot be divided into its units.
    """
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")
    for count, unit in sets:
        if unit < 1 or count % unit:
            raise ValueError(f"units: {count} rows cannot be divided into units of {unit}")
    return 0 if any(count == unit for count, unit in sets) else resamples


def drawn(rng: np.random.Generator, count: int, unit: int = 1) -> np.ndarray:
    """Draws `count` of `count` rows with replacement, `unit` consecutive ones at once, at least two different ones."""
    number = count // unit
    units = rng.integers(number, size=number)
    if (units == units[0]).all():
        units[0] = (units[0] + 1) % number
    return _rows(units, unit)


def normal_interval(centre: float, replicates: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Returns `centre` plus and minus a normal quantile times the replicates' standard deviation; NaN without two."""
    if len(replicates) < 2:
        return math.nan, math.nan
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.std(replicates, ddof=1))
    return centre - half, centre + half


def _rows(units: np.ndarray, unit: int) -> np.ndarray:
    """Returns the rows of units with these numbers."""
    return (units[:, None] * unit + np.arange(unit)).ravel()
