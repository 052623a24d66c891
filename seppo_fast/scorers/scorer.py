"""What a scorer is to evaluation and to methods that learn from rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Scorer(Protocol):
    """Scores pictures or clips for their prompts.

    Attributes:
        name: as it is asked for.
        version: of what it computes; another one is another score.
        digest: of the weights or rules behind it, for the record of a result.
        higher_is_better: which way a gain goes.
    """

    name: str
    version: str
    higher_is_better: bool

    @property
    def digest(self) -> str:
        """See above."""

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """Returns a score for each prompt.

        Args:
            prompts: N of them.
            pictures: uint8 `(N, H, W, 3)`, or clips `(N, F, H, W, 3)`.

        Returns:
            `(N,)` float64; NaN where there is no score for a picture.

        Raises:
            ValueError: other shapes or dtypes, or a prompt that it does not understand.
        """
