"""Calls a scorer, with fewer pictures at once if memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from seppo_fast.scorers.scorer import Scorer
from seppo_fast.utils.logging import warn
from seppo_fast.utils.memory import is_out_of_memory


class ScorerError(Exception):
    """A scorer could not be loaded, or did not return scores."""


class Calls:
    """The calls of one scorer. One that runs out of memory is split in halves, and so are later ones of its size.

    Args:
        name: the scorer's name in messages.
        scorer: the scorer.
    """

    def __init__(self, name: str, scorer: Scorer) -> None:
        self._name, self._scorer = name, scorer
        self._most: int | None = None  # pictures per call after one that ran out of memory

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> tuple[list[float], int]:
        """Returns the scores of pictures or clips for their prompts, and the number of truncated prompts.

        Raises:
            ScorerError: the scorer failed, does not fit into memory even with one picture or clip, or returned
                anything but one score for each.
        """
        if self._most is None or len(prompts) <= self._most:
            try:
                return self._called(prompts, pictures)
            except (MemoryError, RuntimeError) as problem:
                if not is_out_of_memory(problem):
                    raise ScorerError(f"failed ({reason(problem)})") from problem
                if len(prompts) == 1:
                    raise ScorerError(f"does not fit into memory, even with one file ({reason(problem)})") from problem
                if self._most is None:
                    warn(f"scorer {self._name}: out of memory with {len(prompts)} files at once; continuing with fewer")
                self._most = len(prompts) // 2
            if torch.cuda.is_available():  # outside of `except`, because the exception refers to the scorer's tensors
                torch.cuda.empty_cache()
        middle = len(prompts) // 2
        first, cut = self(prompts[:middle], pictures[:middle])
        second, more = self(prompts[middle:], pictures[middle:])
        return first + second, cut + more

    def _called(self, prompts: Sequence[str], pictures: np.ndarray) -> tuple[list[float], int]:
        try:
            scores = np.asarray(self._scorer(prompts, pictures), dtype=np.float64)
        except (MemoryError, RuntimeError):
            raise
        except Exception as problem:
            raise ScorerError(f"failed ({reason(problem)})") from problem
        if scores.shape != (len(prompts),):
            raise ScorerError(f"returned scores of shape {scores.shape} for {len(prompts)} prompts")
        return scores.tolist(), int(getattr(self._scorer, "cut", 0))


def reason(problem: Exception) -> str:
    """Returns an exception's class and the first line of its message."""
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}" if text else type(problem).__name__
