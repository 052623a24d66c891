"""The judges of `python -m benchmarks.anchor`, and the verdicts on samples that follow from their scores.

Shape legend: N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.imports import import_function

Judge = Callable[[Sequence[str], np.ndarray], np.ndarray]
"""(N prompts, N pictures or clips, uint8) -> N scores, higher is better, NaN for no score; see `scorers.Scorer`."""
SHAPES = "shapes"


class Verdict(NamedTuple):
    """A yes-or-no verdict on each pair.

    Attributes:
        positive: `(N,)` bool.
        known: `(N,)` bool; False if the judge gave no score.
    """

    positive: np.ndarray
    known: np.ndarray


def judge_of(name: str) -> Judge:
    """Returns a judge by name: `shapes`, or `module:function`.

    Raises:
        ConfigError: the name is unknown, or cannot be imported or called.
    """
    if name == SHAPES:
        return ShapesScorer()
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ConfigError(f"--judge {name!r} is unknown; give {SHAPES}, or module:function")
    return import_function(name, f"--judge {name!r}")


def scores_of(judge: Judge, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """Returns a judge's scores `(N,)` float64.

    Raises:
        ConfigError: the judge rejects these prompts or pictures, or does not return one number for each.
    """
    try:
        scores = np.asarray(judge(prompts, pictures), dtype=np.float64)
    except (ValueError, TypeError) as problem:
        raise ConfigError(f"--judge cannot score these prompts and pictures: {problem}") from problem
    if scores.shape != (len(prompts),):
        raise ConfigError(f"--judge must return {len(prompts)} scores for as many pictures, got shape {scores.shape}")
    return scores


def wrong(scores: np.ndarray, name: str) -> Verdict:
    """Returns whether samples are wrong: below 1 for `shapes` (not everything is right), else below their median."""
    known = np.isfinite(scores)
    bound = 1.0 if name == SHAPES or not known.any() else float(np.median(scores[known]))
    return Verdict(scores < bound, known)


def worse(scores: np.ndarray, than: np.ndarray) -> Verdict:
    """Returns whether samples have lower scores than other samples of the same pairs; equal scores are not worse."""
    return Verdict(scores < than, np.isfinite(scores) & np.isfinite(than))
