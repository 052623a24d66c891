"""The kernel distance of two sets of feature vectors: the squared maximum mean discrepancy, without bias."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.evaluation.metrics.frechet import features_of
from seppo_fast.utils.random import keyed_rng


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
