"""What `python -m benchmarks.anchor` counts: agreement of signs, areas under ROC curves, means by band of time.

Shape legend: N pairs, K draws of (timestep, noise) of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.utils.random import keyed_rng

RESAMPLES = 1000  # of the pairs, for an interval


def bands(position: np.ndarray, count: int) -> np.ndarray:
    """Returns which of `count` equal bands of the forward process each position lies in.

    Args:
        position: 0 at clean data, 1 at the end of the forward process, any shape.
        count: number of bands.
    """
    return np.clip((position * count).astype(int), 0, count - 1)


def agreement(differences: ArrayLike, chosen: ArrayLike | None = None) -> dict[str, Any]:
    """Returns how often the sign of one draw is the sign of the mean over the pair's other draws.

    Args:
        differences: D_w `(N, K)`, K at least 2.
        chosen: `(N, K)` bool, the draws that are tested; None: all. The mean is over all others in any case.

    Returns:
        `agree`, the share of agreeing draws; `majority`, the share that always guessing the commoner sign of the
        mean would reach; both None without a draw; `draws`, of which they are shares; `ties`, draws left out since
        their difference, or the mean of the others, is exactly 0.
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
    """Returns the chance that a positive scores above a negative, a tie counting half; None where a class is empty.

    Args:
        scores: `(M,)`.
        positive: `(M,)` bool.
        weights: `(M,)`, how often each counts; None: once.
    """
    values, places = np.unique(np.asarray(scores), return_inverse=True)
    which = np.asarray(positive, dtype=bool)
    return _area(places, len(values), which, np.ones(len(which)) if weights is None else np.asarray(weights))


def _area(places: np.ndarray, values: int, positive: np.ndarray, weights: np.ndarray) -> float | None:
    """As `auc`, from the place of each score among the sorted distinct ones."""
    above = np.bincount(places, weights * positive, values)
    below = np.bincount(places, weights * ~positive, values)
    whole = above.sum() * below.sum()
    return float(above @ (below.cumsum() - below / 2) / whole) if whole else None


def auc_of_pairs(scores: ArrayLike, positive: ArrayLike, known: ArrayLike, seed: int) -> dict[str, Any]:
    """Returns the AUC of scores against a verdict on each pair, with a percentile bootstrap over pairs.

    A pair is drawn with all its draws, which share its verdict and are no observations of their own.

    Args:
        scores: `(N, K)`, each a score of its pair.
        positive: `(N,)` bool, the verdict.
        known: `(N,)` bool, pairs that have a verdict; the others are left out.
        seed: of the bootstrap: equal for every score of the same pairs.

    Returns:
        `auc` and its 95 % interval `low`, `high`, None where a class is empty; numbers of `positives` and `negatives`
        (pairs), of `scores` for each, of pairs `left_out`, and of the `resamples` that held both classes.
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
    """Returns mean and number of the values `(N, K)` in each of `count` bands of `position`; the mean of none is None.

    Args:
        values: `(N, K)`.
        position: `(N, K)`, see `bands`.
        count: number of bands.
    """
    flat, where = np.asarray(values, dtype=np.float64).ravel(), bands(position, count).ravel()
    groups = [flat[where == band] for band in range(count)]
    return [{"mean": float(group.mean()) if len(group) else None, "draws": len(group)} for group in groups]
