"""Scores of latents: decodes them and calls a scorer, which may fail on some of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seppo_fast.data.cache.build import encoded_at_once
from seppo_fast.models.family import Family
from seppo_fast.scorers.scorer import Scorer
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.logging import warn
from seppo_fast.utils.memory import is_out_of_memory

_ENOUGH = 32  # items without a single score after which the scorer is taken to be unusable


class LatentScorer:
    """Decodes latents and scores the pictures or clips, in batches.

    An item's score depends only on the items that are passed with it, so a resumed run gets the same scores. The
    family's encoders stay on the device afterwards: SPO scores at every step of the sampler.

    Args:
        scorer: the scorer.
        key: the configuration's key that names the scorer, for messages.
        without: what happens to an item without a score, for messages.
        family: decodes latents.
    """

    def __init__(self, scorer: Scorer, key: str, without: str, family: Family) -> None:
        self._scorer, self._key, self._without, self._family = scorer, key, without, family
        self._told, self._scored_any, self._asked = False, False, 0

    def __call__(self, prompts: Sequence[str], *sets: Tensor) -> np.ndarray:
        """Scores one or more sets of latents for the same prompts.

        Args:
            prompts: the n items' prompts.
            sets: latents `(n, *latent)`. Items that belong together are decoded in one batch and scored in one call.

        Returns:
            `(len(sets), n)` float64; higher is better, whatever the scorer's own direction. If the scorer fails on an
            item, all of its scores are NaN; if a score or a latent is not finite, that score is.

        Raises:
            ConfigError: after `_ENOUGH` items none has had all of its scores.
        """
        size = encoded_at_once(self._family.frames)
        batches = [slice(start, start + size) for start in range(0, len(prompts), size)]
        made = [self._batch(prompts[rows], [latents[rows] for latents in sets]) for rows in batches]
        scores = np.concatenate(made, axis=1)
        self._asked += len(prompts)
        self._scored_any = self._scored_any or not np.isnan(scores).any(0).all()
        if not self._scored_any and self._asked >= _ENOUGH:
            raise ConfigError(
                f"{self._key} = {self._scorer.name}: no score for any of {self._asked} samples. Check that it "
                "understands the prompts and the pictures' size"
            )
        return scores

    def _batch(self, prompts: Sequence[str], sets: list[Tensor]) -> np.ndarray:
        count = len(prompts)
        latents = torch.cat(sets)
        # Latents that are not finite still decode to valid pixels.
        broken = ~torch.isfinite(latents).flatten(1).all(1).view(len(sets), count).numpy(force=True)
        pictures = self._family.decode(latents)
        try:
            return np.where(broken, np.nan, self._scored(prompts, pictures))
        except Exception as problem:  # a scorer may be the user's own function
            if _out_of_memory(problem):
                raise
            self._tell(problem)
        # Item `row` has a picture in each set.
        alone = [self._alone(prompts[row], pictures[row::count]) for row in range(count)]
        return np.where(broken, np.nan, np.concatenate(alone, axis=1))

    def _alone(self, prompt: str, pictures: np.ndarray) -> np.ndarray:
        try:
            return self._scored([prompt], pictures)
        except Exception as problem:
            if _out_of_memory(problem):
                raise
            return np.full((len(pictures), 1), np.nan)

    def _scored(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        sets = len(pictures) // len(prompts)
        scores = np.asarray(self._scorer([*prompts] * sets, pictures), dtype=np.float64)
        if scores.shape != (len(pictures),):
            raise ValueError(f"returned scores of shape {scores.shape} for {len(pictures)} prompts")
        scores = np.where(np.isfinite(scores), scores, np.nan).reshape(sets, len(prompts))
        return scores if self._scorer.higher_is_better else -scores

    def _tell(self, problem: Exception) -> None:
        if not self._told:
            reason = (str(problem).strip() or "no message").splitlines()[0]
            warn(f"{self._key} = {self._scorer.name} failed ({type(problem).__name__}: {reason}); {self._without}")
        self._told = True


def _out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, MemoryError | RuntimeError) and is_out_of_memory(problem)
