"""The registry of scorers: which names exist, which weights they need, and how they are loaded."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from seppo_fast.config.schema import did_you_mean
from seppo_fast.scorers.scorer import Scorer
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.utils.errors import ConfigError

Score = Callable[[Sequence[str], np.ndarray], np.ndarray]


class FunctionScorer:
    """Scores with a function of prompts and pictures; its digest is that of the function's source.

    Args:
        name: the scorer's name.
        function: the function to call.
    """

    higher_is_better = True
    cut = 0

    def __init__(self, name: str, function: Score) -> None:
        self.name = name
        self._function = function
        self.digest = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
        self.version = self.digest[:8]

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """See `Scorer`."""
        return np.asarray(self._function(prompts, pictures), dtype=np.float64)


def brightness(prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """Returns the mean of each picture's or clip's values, divided by 255."""
    return pictures.reshape(len(pictures), -1).mean(axis=1) / 255


@dataclass(frozen=True)
class ScorerEntry:
    """A scorer that can be selected by name.

    Attributes:
        label: its name in tables, with the unit of its scores.
        build: builds it.
    """

    label: str
    build: Callable[[], Scorer]


SCORERS: dict[str, ScorerEntry] = {
    "shapes": ScorerEntry("shapes (share of attributes)", ShapesScorer),
    "brightness": ScorerEntry("brightness", lambda: FunctionScorer("brightness", brightness)),
}


def load_scorer(name: str, device: torch.device, dtype: torch.dtype, folder: Path | None) -> Scorer:
    """Loads a scorer.

    Args:
        name: a key of `SCORERS` or `module:function`, a function of prompts and pictures.
        device: where its networks run.
        dtype: their dtype.
        folder: the folder with the scorers' weights.

    Raises:
        ConfigError: the name is unknown, or the module cannot be imported.
    """
    missing_weights(name, folder)
    if name in SCORERS:
        return SCORERS[name].build()
    module, _, function = name.partition(":")
    try:
        return FunctionScorer(name, getattr(importlib.import_module(module), function))
    except Exception as problem:  # the module's own code may raise anything
        raise ConfigError(f"scorer {name!r} cannot be imported ({type(problem).__name__}: {problem})") from problem


def missing_weights(name: str, folder: Path | None) -> str | None:
    """Returns a message about a scorer's missing files, with source, size and command; None if nothing is missing.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in SCORERS and ":" not in name:
        raise ConfigError(f"scorer {name!r} is unknown{did_you_mean(name, SCORERS)}, or module:function")
    return None
