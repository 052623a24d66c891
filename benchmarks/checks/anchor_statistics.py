"""The statistics of `python -m benchmarks.anchor`: agreement of signs, areas under ROC curves, means by band of time.

Shape legend: N pairs, K draws of (timestep, noise) per pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.utils.random import keyed_rng

RESAMPLES = 1000  # bootstrap resamples of the pairs per interval


def bands(position: np.ndarray, count: int) -> np.ndarray:
    """Returns the index of the band of the forward process that contains each position; bands have equal width.

    Args:
        position: 0 at clean data, 1 at the end of the forward process; any shape.
        count: number of bands.
    """
    return np.clip((position * count).astype(int), 0, count - 1)


def agreement(differences: ArrayLike, chosen: ArrayLike | None = None) -> dict[str, Any]:
    """Returns how often the sign of one draw equals the sign of the mean over the pair's other draws.

    Args:
        differences: D_w `(N, K)`, K at least 2.
        chosen: `(N, K)` bool, the draws to test; None: all. The mean is always over all other draws.

    Returns:
        `agree`, the share of agreeing draws, and `majority`, the share reached by always guessing the mean's more
        frequent sign; both are None without draws. `draws`, the number of draws counted, and `ties`, the number of
        draws left out because their difference or the mean of the others is exactly 0.
    """
    one = np.asarray(differences, dtype=np.float64)
    others = (one.sum(axis=1, keepdims=True) - one) / (one.shape[1] - 1)
    tested = np.ones(one.shape, dtype=bool) if chosen is None else np.asarray(chosen, dtype=bool)
    counted = tested & (one != 0) & (others != 0)
    draws, positive = int(counted.sum()), float((others[counted] > 0).mean()) if counted.any() else 0.0
    return {
        "agree": float(((one > 0) == (others > 0))[counted].mean()) if draws else None,
        "majority": max(positive, 1 - positive) if draws else None,
        "draws": draws,
        "ties": int(tested.sum()) - draws,
    }


def auc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> float | None:
    """Returns the probability that a positive scores above a negative (ties count half), or None if a class is empty.

    Args:
        scores: `(M,)`.
        positive: `(M,)` bool.
        weights: `(M,)`, how often each score counts; None: once.
    """
    values, places = np.unique(np.asarray(scores), return_inverse=True)
    which = np.asarray(positive, dtype=bool)
    return _area(places, len(values), which, np.ones(len(which)) if weights is None else np.asarray(weights))


def _area(places: np.ndarray, values: int, positive: np.ndarray, weights: np.ndarray) -> float | None:
    """Computes `auc` from the index of each score among the sorted distinct scores."""
    above = np.bincount(places, weights * positive, values)
    below = np.bincount(places, weights * ~positive, values)
    whole = above.sum() * below.sum()
    return float(above @ (below.cumsum() - below / 2) / whole) if whole else None


def auc_of_pairs(scores: ArrayLike, positive: ArrayLike, known: ArrayLike, seed: int) -> dict[str, Any]:
    """Returns the AUC of scores against a verdict on each pair, with a percentile bootstrap over pairs.

    A pair is resampled together with all its draws, since these share its verdict and are not independent observations.

    Args:
        scores: `(N, K)`, K scores per pair.
        positive: `(N,)` bool, the verdict.
        known: `(N,)` bool, whether a pair has a verdict; the others are left out.
        seed: seed of the bootstrap, the same for all scores of the same pairs.

    Returns:
        `auc` and its 95 % interval `low`, `high`, all None if a class is empty; the numbers of pairs that are
        `positives`, `negatives` and `left_out`, of `scores` per pair, and of `resamples` that had both classes.
    """
    kept, known = np.asarray(scores, dtype=np.float64), np.asarray(known, dtype=bool)
    kept, verdict = kept[known], np.asarray(positive, dtype=bool)[known]
    pairs, draws = kept.shape
    values, places = np.unique(kept.ravel(), return_inverse=True)
    which = verdict.repeat(draws)
    rng = keyed_rng(seed, "anchor bootstrap")
    found = []
    both = 0 < verdict.sum() < pairs
    for _ in range(RESAMPLES if both else 0):
        often = np.bincount(rng.integers(pairs, size=pairs), minlength=pairs).astype(np.float64)
        area = _area(places, len(values), which, often.repeat(draws))
        if area is not None:
            found.append(area)
    low, high = np.quantile(found, [0.025, 0.975]).tolist() if found else (None, None)
    return {
        "auc": _area(places, len(values), which, np.ones(len(which))),
        "low": low,
        "high": high,
        "positives": int(verdict.sum()),
        "negatives": int(pairs - verdict.sum()),
        "scores": draws,
        "left_out": int((~known).sum()),
        "resamples": len(found),
    }


def mean_by_band(values: ArrayLike, position: np.ndarray, count: int) -> list[dict[str, Any]]:
    """Returns mean and number of the values in each of `count` bands of `position`; the mean is None in an empty band.

    Args:
        values: `(N, K)`.
        position: `(N, K)`, see `bands`.
        count: number of bands.
    """
    flat, where = np.asarray(values, dtype=np.float64).ravel(), bands(position, count).ravel()
    groups = [flat[where == band] for band in range(count)]
    return [{"mean": float(group.mean()) if len(group) else None, "draws": len(group)} for group in groups]
