"""Verdicts on samples: a scorer compares each with its winner, for the same prompt and through the same decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.methods.rewards.scoring import LatentScorer
from seppo_fast.models.family import Family
from seppo_fast.scorers.scorer import Scorer


class Judge:
    """Scores samples and winners, and says which samples to reject.

    Winners are decoded from their latents like samples, so that both have passed the same encoder and decoder.

    Args:
        scorer: the scorer.
        family: decodes latents; its encoders are parked after each call.
        cache: winners and prompts of the training data.
    """

    def __init__(self, scorer: Scorer, family: Family, cache: LatentCache) -> None:
        without = "pairs without a score are skipped, see judge_skipped in the log"
        self._scores = LatentScorer(scorer, "reference.judge", without, family)
        self._family, self._cache = family, cache

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
            ConfigError: too many samples in a row have had no score; see `LatentScorer`.
        """
        examples = [sample % len(self._cache) for sample in sample_ids]
        prompts = [self._cache.prompts[example] for example in examples]
        winners = self._cache.winners(examples).float()
        try:
            winner, sample = torch.from_numpy(self._scores(prompts, winners, samples.to(winners.device)))
        finally:
            self._family.park_encoders()
        gain = sample - winner
        return torch.where(gain.isnan(), 0.0, torch.where(gain > 0, -1.0, 1.0))
