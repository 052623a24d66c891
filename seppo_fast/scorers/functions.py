"""Scorers made of a function: the user's own, as `module:function`, and the brightness for tests."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence

import numpy as np

from seppo_fast.scorers.published import check
from seppo_fast.utils.errors import ConfigError


class FunctionScorer:
    """Scores with a function of prompts and pictures; see `Scorer` for its arguments and result.

    The digest is that of the source of the function's module; modules and weights that it loads are not included. The
    version is the beginning of the digest, so that scores of a changed function are not mixed with older ones.

    Args:
        name: the scorer's name.
        function: the function to call.
    """

    higher_is_better = True
    cut = 0

    def __init__(self, name: str, function: Callable[[Sequence[str], np.ndarray], np.ndarray]) -> None:
        self.name = name
        self._function = function
        source = inspect.getsource(sys.modules[function.__module__])
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        self.version = self.digest[:8]

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """See `Scorer`; ValueError also if the function returns anything but N numbers."""
        check(prompts, pictures)
        if not len(prompts):
            return np.zeros(0)
        result = self._function(prompts, pictures)
        try:
            scores = np.asarray(result, dtype=np.float64)
        except (TypeError, ValueError) as problem:
            raise ValueError(f"{self.name}: expected {len(prompts)} scores, got {type(result).__name__}") from problem
        if scores.shape != (len(prompts),):
            raise ValueError(f"{self.name}: expected scores of shape ({len(prompts)},), got {scores.shape}")
        return scores


def brightness(prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
    """Returns the mean of each picture's or clip's values, divided by 255. It ignores the prompts."""
    del prompts
    return pictures.reshape(len(pictures), -1).mean(axis=1) / 255


def own_scorer(name: str) -> FunctionScorer:
    """Imports the function that `module:function` names, and returns its scorer.

    Raises:
        ConfigError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:  # the module's own code may raise anything
        raise ConfigError(
            f"scorer {name!r}: module {module_name!r} cannot be imported ({type(problem).__name__}: {problem}); its "
            "folder must be on PYTHONPATH"
        ) from problem
    function = vars(module).get(function_name)
    if not inspect.isfunction(function):
        found = "has no" if function is None else "has no function"
        raise ConfigError(f"scorer {name!r}: module {module_name!r} {found} {function_name!r}; define it there")
    try:
        return FunctionScorer(name, function)
    except OSError as problem:
        raise ConfigError(f"scorer {name!r}: its source, which its digest needs, is missing ({problem})") from problem
