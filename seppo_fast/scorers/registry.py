"""The registry of scorers: which names exist, which weights they need, and how they are loaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seppo_fast.config.schema import did_you_mean
from seppo_fast.scorers.scorer import Scorer
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.utils.errors import ConfigError


class BrightnessScorer:
    """Scores the mean of a picture's or a clip's pixels, from 0 (black) to 1 (white)."""

    name = "brightness"
    version = "1"
    digest = "brightness-1"
    higher_is_better = True
    cut = 0

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """See `Scorer`."""
        return pictures.reshape(len(pictures), -1).mean(axis=1, dtype=np.float64) / 255


@dataclass(frozen=True)
class ScorerEntry:
    """How a scorer is made.

    Attributes:
        make: returns the scorer; called with the device, the dtype of its computation and the folder of weights.
    """

    make: Callable[[torch.device, torch.dtype, Path | None], Scorer]


SCORERS: dict[str, ScorerEntry] = {
    "shapes": ScorerEntry(lambda device, dtype, folder: ShapesScorer()),
    "brightness": ScorerEntry(lambda device, dtype, folder: BrightnessScorer()),
}


def load_scorer(name: str, device: torch.device, dtype: torch.dtype, folder: Path | None) -> Scorer:
    """Returns a scorer by its name in `SCORERS`, or `module:function`, whose function is called without arguments.

    Raises:
        ConfigError: the name is unknown.
    """
    if name in SCORERS:
        return SCORERS[name].make(device, dtype, folder)
    scorer: Scorer = _function(name)()
    return scorer


def missing_weights(name: str, folder: Path | None) -> str | None:
    """Returns which weights a scorer lacks, their size and how to get them; None if it can be loaded.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in SCORERS:
        _function(name)
    return None


def _function(name: str) -> Callable[[], Scorer]:
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(f"--scorers: {name!r} is unknown{did_you_mean(name, SCORERS)}; or module:function")
    try:
        found: Callable[[], Scorer] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ConfigError(f"--scorers: {name!r} cannot be imported ({problem})") from problem
    return found
