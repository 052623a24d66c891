"""The embedded worlds' judges as a scorer."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence

import numpy as np

from seppo_fast.shapes import judge, motion_judge


class ShapesScorer:
    """The share of the attributes in a caption that the judge finds: of a picture its things, of a clip its motion."""

    name = "shapes"
    version = "1"
    higher_is_better = True

    @property
    def digest(self) -> str:
        """sha256 of the judges' code."""
        code = "".join(inspect.getsource(module) for module in (judge, motion_judge))
        return hashlib.sha256(code.encode()).hexdigest()

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """See `Scorer`; prompts are captions of the worlds, frames 32 x 32."""
        score_all = motion_judge.score_all if np.ndim(pictures) == 5 else judge.score_all
        return np.asarray(score_all(list(prompts), pictures), dtype=np.float64)
