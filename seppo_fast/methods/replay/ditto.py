"""DITTO on pictures and clips: demonstrations against samples, and newer against older samples.

The reference is checkpoint 0, which should be a model that was fine-tuned on the demonstrations. DITTO was published
for language models; what differs here is said in docs/methods.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.pairs import Pairs
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.preference import PreferenceMethod, averages
from seppo_fast.methods.replay.buffer import Key, SampleBuffer
from seppo_fast.methods.replay.comparisons import Comparison, Comparisons

_INITIAL = 0  # the checkpoint that is the reference


class DittoMethod(PreferenceMethod):
    """Trains on comparisons with the model's own samples of this and of all earlier iterations (DITTO).

    At the start of an iteration the newest checkpoint generates a sample for each pair of the iteration's updates.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        super().__init__(parts)
        assert parts.draws.pool is not None
        self._pool = parts.draws.pool
        self._processes = parts.processes
        self._maker = self.rollout.maker
        folder = Path(parts.config.output) / "state" / ".buffer"  # hidden, since it is not a state
        shape = parts.cache.latent_shape
        self._buffer = SampleBuffer(folder, parts.config.train.pairs_per_update, shape, parts.processes)
        self._comparisons = Comparisons(parts.config, self._maker)
        self._current: dict[int, Comparison] = {}
        self._compared = 0
        self._window_share = 0.0

    def collect(self, update: int, reference: int | None) -> Pairs:
        """Returns this process's comparisons of an update; the first call of an iteration generates its samples.

        Args:
            update: the update's index, from 0.
            reference: the newest checkpoint, which generates.
        """
        assert reference is not None
        if update not in self._buffer:
            self._generate(update, reference)
        started = time.perf_counter()
        everyones = self._comparisons.of(update)
        self._compared = len(everyones)
        pairs = self._pairs(update, everyones[self._processes.rank :: self._processes.world])
        with self.rollout.offload_context(), self.strategy.load_reference(self._pool, _INITIAL) as model:
            pairs = replace(pairs, ref_error=self.strategy.ahead(model, lambda: pairs))
        self.rollout.seconds = self._window_share + time.perf_counter() - started
        return pairs

    def _generate(self, update: int, reference: int) -> None:
        """Generates and writes the samples of the rest of an iteration."""
        started = time.perf_counter()
        length = self._config.train.updates_per_iteration
        window = range(update, min(update - update % length + length, self._config.train.updates))
        ids = {update: self._maker.all_sample_ids(update) for update in window}
        keys = [(key.update, ids[key.update][key.place]) for key in self._buffer.share(window)]
        with self.rollout.offload_context(), self.strategy.load_reference(self._pool, reference) as model:
            samples = self.rollout.generate(model, keys)
        self._buffer.write(window, samples)
        self.rollout.generation.agree()
        self._window_share = (time.perf_counter() - started) / len(window)

    def _pairs(self, update: int, comparisons: list[Comparison]) -> Pairs:
        self._current = {comparison.sample_id: comparison for comparison in comparisons}
        losers = self._buffer.read([comparison.loser for comparison in comparisons])
        pairs = self._maker.pairs(update, list(self._current), losers)
        newer: dict[int, Key] = {row: made.winner for row, made in enumerate(comparisons) if made.winner is not None}
        if newer:
            pairs.winners[list(newer)] = self._buffer.read(list(newer.values())).to(pairs.winners)
        return pairs

    def loss(self, policy: nn.Module, micro_batch: Pairs, grad_scale: Tensor) -> StepLoss:
        """Returns Diffusion-DPO's loss."""
        step = super().loss(policy, micro_batch, grad_scale)
        made = [self._current[sample] for sample in micro_batch.sample_ids]
        counts = {
            "replayed": sum(one.replayed and one.winner is None for one in made),
            "newer_over_older": sum(one.winner is not None for one in made),
        }
        sums = {name: step.sums["loss"].new_full((), count) for name, count in counts.items()}
        return replace(step, sums=step.sums | sums)

    def rows(self, batch: Pairs) -> int:
        """Returns the number of comparisons of an update, which may be smaller than `train.pairs_per_update`."""
        return self._compared

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns means over the comparisons made, their number (`compared`), and the shares of their kinds.

        These are `replayed`, demonstrations against samples of earlier iterations, and `newer_over_older`.
        """
        return averages(sums, rows) | {"compared": rows}

    def files(self) -> Mapping[str, Path]:
        """Returns the files of all samples so far."""
        return self._buffer.files()

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Takes the samples so far from a saved state."""
        self._buffer.restore(folder)
