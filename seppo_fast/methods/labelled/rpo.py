"""Diffusion-RPO on labelled pairs: every winner of a block of pairs against every loser of it.

As far as the paper can be read: no code is public. The weights follow from the prompts alone, by the text embeddings
that the cache holds; the paper embeds pictures too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from seppo_fast.loss import denoising_errors
from seppo_fast.methods.losses.rows import weighted_error_gradient
from seppo_fast.methods.losses.rpo import rpo, rpo_weights
from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.pairs import Pairs, sent
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.preference import PreferenceMethod
from seppo_fast.models.encoders import PROMPT_EMBEDS


class RpoMethod(PreferenceMethod):
    """Trains on labelled pairs, comparing all winners and losers of a block of `rpo.block` pairs (Diffusion-RPO).

    Blocks are cut from an update's pairs before these are dealt to processes, so they do not depend on the number of
    processes or on the micro-batch. Each pair keeps its own time and noise, as in Diffusion-DPO.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        self._cache = parts.cache

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """Returns Diffusion-RPO's loss on a micro-batch of whole blocks."""
        made = self.strategy.predictions(policy, micro_batch)
        assert made.ref_error is not None
        train, settings = self._config.train, self._config.rpo
        error = denoising_errors(made.policy.detach(), made.target, backend=train.backend)
        embeds = sent(self._prompt_embeds(micro_batch.sample_ids), error.device).unflatten(0, (-1, settings.block))
        weights = rpo_weights(embeds, embeds, temperature=settings.temperature)
        winner, loser = error.view(2, -1, settings.block)
        ref_winner, ref_loser = made.ref_error.view(2, -1, settings.block)
        rows = rpo(winner, loser, ref_winner, ref_loser, weights, beta=train.beta)
        gradient = weighted_error_gradient(made.policy, [made.target], rows.coefficients * grad_scale)
        errors = {"winner_error": winner, "loser_error": loser}
        errors |= {"ref_winner_error": ref_winner, "ref_loser_error": ref_loser}
        sums = rows.sums | {name: values.sum() for name, values in errors.items()}
        return StepLoss(made.policy, gradient, sums, halves=2)

    def _prompt_embeds(self, sample_ids: Sequence[int]) -> Tensor:
        """Returns the mean over tokens of each pair's prompt embeddings, `(B, D)` float32; no prompt is dropped."""
        rows = self._cache.conditioning([sample % len(self._cache) for sample in sample_ids])
        return rows[PROMPT_EMBEDS].float().mean(1)
