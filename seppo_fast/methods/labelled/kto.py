"""Diffusion-KTO on single pictures or clips that are labelled as liked or disliked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seppo_fast.config.objectives import OFFSET_ROWS
from seppo_fast.loss import denoising_errors
from seppo_fast.methods.losses.kto import kto, kto_offset
from seppo_fast.methods.losses.rows import weighted_error_gradient
from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.pairs import Pairs, sent
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.preference import PreferenceMethod

_ERRORS = ("winner_error", "loser_error", "ref_winner_error", "ref_loser_error")


class KtoMethod(PreferenceMethod):
    """Trains on labelled examples, by the denoising errors of policy and reference (Diffusion-KTO).

    The offset z_0 couples the rows of an update. It is estimated before the update's first micro-batch from the first
    `OFFSET_ROWS` rows, by one more forward of the policy. So it is the same for any micro-batch and number of
    processes.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        self._processes = parts.processes
        self._collected: Pairs | None = None
        self._offset: Tensor | None = None

    def collect(self, update: int, reference: int | None) -> Pairs:
        """Returns the labelled examples of an update, with the reference's errors."""
        self._collected, self._offset = super().collect(update, reference), None
        return self._collected

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """Returns KTO's loss on a micro-batch; the first call for an update also estimates the offset."""
        if self._offset is None:
            self._offset = self._estimate(policy)
        made = self.strategy.predictions(policy, micro_batch)
        assert made.ref_error is not None and micro_batch.labels is not None
        error = denoising_errors(made.policy.detach(), made.target, backend=self._config.train.backend)
        liked = sent(micro_batch.labels, error.device)
        rows = kto(error, made.ref_error, liked, self._offset, beta=self._config.train.beta)
        gradient = weighted_error_gradient(made.policy, [made.target], rows.coefficients * grad_scale)
        sums = rows.sums | {"offset": self._offset * len(micro_batch)}
        for name, those in {"winner_error": liked, "loser_error": ~liked}.items():
            sums[name] = error.where(those, 0.0).sum()
            sums[f"ref_{name}"] = made.ref_error.where(those, 0.0).sum()
        return StepLoss(made.policy, gradient, sums)

    def _estimate(self, policy: nn.Module) -> Tensor:
        """Returns z_0. Its errors come from whole micro-batches, so that it is exactly 0 at equal weights."""
        assert self._collected is not None and self._config.train.micro_batch is not None
        uses, world = self._config.reference.uses, self._processes.world
        samples = min(-(-OFFSET_ROWS // uses), self._config.train.pairs_per_update // uses)
        mine = uses * len(range(self._processes.rank, samples, world))  # samples are dealt round-robin
        most, done = uses * -(-samples // world), 0  # shards need equally many forwards in all processes
        gain = torch.zeros((), device=self.strategy.device)
        for part in self._collected.micro_batches(self._config.train.micro_batch):
            if done >= most:
                break
            error, ref_error = self._errors(policy, part)
            gain = gain + (ref_error - error)[: max(mine - done, 0)].sum()
            done += len(part)
        return kto_offset(self._processes.sum(gain), samples * uses)

    def _errors(self, policy: nn.Module, part: Pairs) -> tuple[Tensor, Tensor]:
        """Returns the errors of policy and reference on a micro-batch; its activations are freed on return."""
        made = self.strategy.predictions(policy, part)
        assert made.ref_error is not None
        return denoising_errors(made.policy.detach(), made.target, backend=self._config.train.backend), made.ref_error

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns means over the rows; the errors named after winners and losers are those of liked and disliked rows.

        An error is left out if an update has no such row.
        """
        counts = {"winner": sums["liked"], "loser": rows - sums["liked"]}
        means = {name: value / rows for name, value in sums.items() if name not in _ERRORS}
        of = {name: counts[name.removeprefix("ref_").removesuffix("_error")] for name in _ERRORS}
        return means | {name: sums[name] / of[name] for name in _ERRORS if of[name]}
