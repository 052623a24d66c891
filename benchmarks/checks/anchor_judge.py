"""Who judges pictures in `python -m benchmarks.anchor`, and what follows for a sample: the verdicts.

Shape legend: N pairs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.utils.errors import ConfigError

Judge = Callable[[Sequence[str], np.ndarray], np.ndarray]
"""(N prompts, N pictures or clips uint8) -> N scores, higher is better, NaN where it has none; see `scorers.Scorer`"""
SHAPES = "shapes"


class Verdict(NamedTuple):
    """A yes or no on each pair.

    Attributes:
        positive: `(N,)` bool.
        known: `(N,)` bool; False where the judge gave no score.
    """

    positive: np.ndarray
    known: np.ndarray


def judge_of(name: str) -> Judge:
    """Returns the judge of a name: `shapes`, or `module:function`.

    Raises:
        ConfigError: no such judge.
    """
    if name == SHAPES:
        return ShapesScorer()
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ConfigError(f"--judge {name!r} is unknown; give {SHAPES}, or module:function")
    try:
        judge = getattr(importlib.import_module(module), function)
    except Exception as problem:  # a module runs as it is imported, and can raise anything
        raise ConfigError(f"--judge {name!r} cannot be imported: {type(problem).__name__}: {problem}") from problem
    if not callable(judge):
        raise ConfigError(f"--judge {name!r} is a {type(judge).__name__} and cannot be called")
    return judge


def scores_of(judge: Judge, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """Returns a judge's scores `(N,)` float64.

    Raises:
        ConfigError: it does not take these prompts or pictures, or gives anything but a number for each.
    """
    try:
        scores = np.asarray(judge(prompts, pictures), dtype=np.float64)
    except (ValueError, TypeError) as problem:
        raise ConfigError(f"--judge does not score these prompts and pictures: {problem}") from problem
    if scores.shape != (len(prompts),):
        raise ConfigError(f"--judge must give {len(prompts)} scores for as many pictures, got shape {scores.shape}")
    return scores


def wrong(scores: np.ndarray, name: str) -> Verdict:
    """Returns whether samples are wrong: less than everything right for `shapes`, else worse than their median."""
    known = np.isfinite(scores)
    bound = 1.0 if name == SHAPES or not known.any() else float(np.median(scores[known]))
    return Verdict(scores < bound, known)


def worse(scores: np.ndarray, than: np.ndarray) -> Verdict:
    """Returns whether samples have lower scores than others of the same pairs; equal is not worse."""
    return Verdict(scores < than, np.isfinite(scores) & np.isfinite(than))
