"""MaPO on labelled pairs: neither samples nor a reference, so an update costs two forwards and backwards per pair."""

from __future__ import annotations

import time

from torch import Tensor, nn

from seppo_fast.loss import denoising_errors
from seppo_fast.methods.losses.mapo import mapo
from seppo_fast.methods.losses.rows import weighted_error_gradient
from seppo_fast.methods.method import Method, StepLoss
from seppo_fast.methods.pairs import Pairs, noised
from seppo_fast.methods.parts import MethodParts

Q, STEPS = 0.5, 1000.0  # as published; see `methods.losses.mapo`


class MapoMethod(Method):
    """Trains on winners, with a margin to the labelled losers (MaPO).

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        self._train = parts.config.train
        self._maker = parts.pair_maker()
        self._schedule = parts.family.schedule
        self._denoiser = parts.denoiser

    def collect(self, update: int, reference: int | None) -> Pairs:
        """Returns the labelled pairs of an update."""
        assert reference is None
        started = time.perf_counter()
        pairs = self._maker.pairs(update, self._maker.sample_ids(update))
        self.seconds = time.perf_counter() - started
        return pairs

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """Returns MaPO's loss on a micro-batch, by one forward of both halves."""
        shown = noised(micro_batch, self._schedule, self._denoiser.device)
        prediction = self._denoiser.denoise(policy, *shown[:3])
        winner, loser = denoising_errors(prediction.detach(), shown.target, backend=self._train.backend).chunk(2)
        rows = mapo(winner, loser, beta=self._train.beta, q=Q, steps=STEPS)
        gradient = weighted_error_gradient(prediction, [shown.target], rows.coefficients * grad_scale)
        return StepLoss(prediction, gradient, rows.sums, halves=2)
