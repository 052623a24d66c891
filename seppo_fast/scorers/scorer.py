"""The interface of scorers, used by evaluation and by methods that learn from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Scores pictures or clips for their prompts.

    Attributes:
        name: the name by which the scorer is selected.
        version: the version of what it computes; scores of different versions are not comparable.
        digest: a digest of the weights or rules behind the scores, to be recorded with results.
        higher_is_better: whether a higher score is better.
        cut: how many prompts of the last call were cut to the scorer's text limit; 0 without a limit.
    """

    name: str
    version: str
    higher_is_better: bool
    cut: int

    @property
    def digest(self) -> str:
        """A digest of the weights or rules; see the class."""

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """Returns a score for each prompt.

        Args:
            prompts: the N prompts.
            pictures: the pictures `(N, H, W, 3)` uint8, or clips `(N, F, H, W, 3)`.

        Returns:
            Scores `(N,)` float64; NaN for a picture without a score. Published scorers of pictures give a clip the mean
            of its frames' scores, and never NaN.

        Raises:
            ValueError: a shape or dtype is wrong, or the scorer does not understand a prompt.
        """
