"""Agreement between raters who assign categories to items.

All functions take `ratings`, integers `(items, raters)`: a category from 0 on, or -1 where a rater gave no answer.
They return NaN where the coefficient is undefined.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def fleiss_kappa(ratings: ArrayLike) -> float:
    """Returns Fleiss' kappa (Fleiss 1971, "Measuring nominal scale agreement among many raters", equations 3 to 7).

    It is undefined unless all raters answered all items, or if all answers are the same.

    Raises:
        ValueError: `ratings` does not have two dimensions.
    """
    counts = _counts(ratings)
    raters = counts.sum(axis=1)
    if not len(counts) or raters.min() != raters.max() or np.asarray(ratings).min() < 0 or raters[0] < 2:
        return math.nan
    observed = pairwise_agreement(ratings)
    expected = float(((counts.sum(axis=0) / counts.sum()) ** 2).sum())
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def krippendorff_alpha(ratings: ArrayLike) -> float:
    """Returns Krippendorff's alpha for nominal data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    Items with fewer than two answers are left out. It is undefined if no others exist, or if all answers are the same.

    Raises:
        ValueError: `ratings` does not have two dimensions.
    """
    counts = _counts(ratings)
    counts = counts[counts.sum(axis=1) >= 2]
    answers = counts.sum(axis=1)
    total, of_category = counts.sum(), counts.sum(axis=0)
    # Pairs of unlike answers: within items, each weighted by 1 / (answers - 1), and among all answers.
    within = float(((answers**2 - (counts**2).sum(axis=1)) / np.maximum(answers - 1, 1)).sum())
    among = float(total**2 - (of_category**2).sum())
    return 1 - (total - 1) * within / among if among else math.nan


def pairwise_agreement(ratings: ArrayLike) -> float:
    """Returns the share of equal answers among all pairs of answers to the same item; undefined without such pairs.

    Raises:
        ValueError: `ratings` does not have two dimensions.
    """
    counts = _counts(ratings)
    answers = counts.sum(axis=1)
    pairs = float((answers * (answers - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else math.nan


def _counts(ratings: ArrayLike) -> np.ndarray:
    """Returns the number of answers `(items, categories)` as float64."""
    table = np.asarray(ratings)
    if table.ndim != 2:
        raise ValueError(f"ratings: expected (items, raters), got shape {table.shape}")
    return (table[:, :, None] == np.arange(int(table.max(initial=-1)) + 1)).sum(axis=1).astype(np.float64)
