"""Verdicts on samples: a scorer compares each with its winner, for the same prompt and through the same decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from seppo_fast.data.cache.build import encoded_at_once
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.models.family import Family
from seppo_fast.scorers.scorer import Scorer
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.logging import warn
from seppo_fast.utils.memory import is_out_of_memory

_ENOUGH = 32  # samples without a single score after which the scorer is taken to be unusable


class Judge:
    """Scores samples and winners, and says which samples to reject.

    Winners are decoded from their latents like samples, so that both have passed the same encoder and decoder. A pair's
    scores depend only on the samples that are passed with it, so a resumed run gets the same verdicts.

    Args:
        scorer: the scorer.
        family: decodes latents; its encoders are parked after each call.
        cache: winners and prompts of the training data.
    """

    def __init__(self, scorer: Scorer, family: Family, cache: LatentCache) -> None:
        self._scorer, self._family, self._cache = scorer, family, cache
        self._told, self._scored_any, self._asked = False, False, 0

    def __call__(self, sample_ids: Sequence[int], samples: Tensor) -> Tensor:
        """Returns the verdicts on samples: 1 rejects, -1 learns, 0 skips.

        A sample that scores higher than its winner is learned from. A lower or equal score rejects it. If the scorer
        fails on a pair, or gives NaN, the pair is skipped.

        Args:
            sample_ids: the n samples' ids.
            samples: their latents `(n, *latent)`.

        Returns:
            `(n,)` float32.

        Raises:
            ConfigError: after `_ENOUGH` samples none has had a score.
        """
        size = encoded_at_once(self._family.frames)
        try:
            gains = [
                self._gains(sample_ids[start : start + size], samples[start : start + size])
                for start in range(0, len(sample_ids), size)
            ]
        finally:
            self._family.park_encoders()
        gain = torch.from_numpy(np.concatenate(gains))
        self._asked += len(gain)
        self._scored_any = self._scored_any or not bool(gain.isnan().all())
        if not self._scored_any and self._asked >= _ENOUGH:
            raise ConfigError(
                f"reference.judge = {self._scorer.name}: no score for any of {self._asked} samples and their winners. "
                "Check that it understands the prompts and the pictures' size"
            )
        return torch.where(gain.isnan(), 0.0, torch.where(gain > 0, -1.0, 1.0))

    def _gains(self, sample_ids: Sequence[int], samples: Tensor) -> np.ndarray:
        """Returns how much better each sample scores than its winner `(n,)` float64; NaN where a score is missing."""
        examples = [sample % len(self._cache) for sample in sample_ids]
        prompts = [self._cache.prompts[example] for example in examples]
        winners = self._cache.winners(examples).float()
        pictures = self._family.decode(torch.cat([winners, samples.to(winners.device)]))
        won, made = pictures[: len(examples)], pictures[len(examples) :]
        try:
            return self._scored(prompts, won, made)
        except Exception as problem:  # a scorer may be the user's own function
            if isinstance(problem, MemoryError | RuntimeError) and is_out_of_memory(problem):
                raise
            self._tell(problem)
        return np.concatenate([self._alone(prompts[i], won[i : i + 1], made[i : i + 1]) for i in range(len(prompts))])

    def _alone(self, prompt: str, winner: np.ndarray, sample: np.ndarray) -> np.ndarray:
        try:
            return self._scored([prompt], winner, sample)
        except Exception as problem:
            if isinstance(problem, MemoryError | RuntimeError) and is_out_of_memory(problem):
                raise
            return np.array([np.nan])

    def _scored(self, prompts: Sequence[str], winners: np.ndarray, samples: np.ndarray) -> np.ndarray:
        scores = np.asarray(self._scorer([*prompts, *prompts], np.concatenate([winners, samples])), dtype=np.float64)
        if scores.shape != (2 * len(prompts),):
            raise ValueError(f"returned scores of shape {scores.shape} for {2 * len(prompts)} prompts")
        scores = np.where(np.isfinite(scores), scores, np.nan)
        winner, sample = np.split(scores, 2)
        return sample - winner if self._scorer.higher_is_better else winner - sample

    def _tell(self, problem: Exception) -> None:
        if not self._told:
            reason = (str(problem).strip() or "no message").splitlines()[0]
            warn(
                f"reference.judge = {self._scorer.name} failed ({type(problem).__name__}: {reason}); pairs without a "
                "score are skipped, see judge_skipped in the log"
            )
        self._told = True
