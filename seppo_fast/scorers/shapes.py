"""A scorer made of the embedded worlds' judges."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence

import numpy as np

from seppo_fast.shapes import judge, motion_judge


class ShapesScorer:
    """Scores the share of a caption's attributes that the judge finds in a picture, or in a clip with its motion."""

    name = "shapes"
    version = "1"
    higher_is_better = True
    cut = 0

    @property
    def digest(self) -> str:
        """The SHA-256 of the judges' source code."""
        code = "".join(inspect.getsource(module) for module in (judge, motion_judge))
        return hashlib.sha256(code.encode()).hexdigest()

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """See `Scorer`; prompts must be captions of the embedded worlds, frames must be 32 x 32 pixels."""
        score_all = motion_judge.score_all if np.ndim(pictures) == 5 else judge.score_all
        return np.asarray(score_all(list(prompts), pictures), dtype=np.float64)
