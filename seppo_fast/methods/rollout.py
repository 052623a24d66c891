"""Generates the drawn reference's samples, and its denoising errors, for several coming updates at once.

A drawn reference is frozen, so everything that depends on it alone can be computed before the policy trains, while its
weights are on the device: samples in batches of any size that fits, independent of the training batch, and errors in
the learner's own micro-batches (see `reference_errors`). Only one latent and two numbers per pair are kept for the
learner. Everything else is a function of (seed, update, sample id) and is recomputed when needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.methods.draws import Draws
from seppo_fast.methods.generation import Generation, Keys
from seppo_fast.methods.pairs import PairMaker, Pairs
from seppo_fast.methods.reference_errors import ReferenceStrategy

_FULL_BATCHES = 8  # sampling batches per window: a last batch that is not full then wastes an eighth at most


class RolledOut(NamedTuple):
    """What was computed ahead for the n samples of an update.

    Attributes:
        samples: `(n, *latent)` float32 on the CPU; None if the objective generates none.
        errors: the reference's denoising errors of the pairs; None if they are not computed ahead.
        verdicts: `(n,)` float32, see `Pairs.verdict`; None if no scorer is asked.
    """

    samples: Tensor | None = None
    errors: Tensor | None = None
    verdicts: Tensor | None = None


class Rollout:
    """Makes the pairs of each update. A window of consecutive updates is rolled out together, to fill sampling batches.

    Attributes:
        seconds: time that the last update's pairs took, including an equal share of its window's rollout.
        maker: makes the pairs, except for the reference's samples and errors.
        generation: generates in batches.
        waiting: what was computed for updates that were rolled out ahead, by update.
        offload_context: entered while a reference is resident, to free device memory that only the learner needs.

    Args:
        config: the run's configuration, with its batch sizes chosen.
        maker: see above.
        strategy: generates the reference's samples, and computes its errors ahead if `reference.errors` is "ahead".
        draws: the past policies; starts copying the next drawn one to the device.
        generation: see above. If it is interrupted, the policy and the pairs in `waiting` are unchanged.
        judge: returns the verdicts on an update's samples, given their ids; None if no scorer is asked.
    """

    def __init__(
        self,
        config: Config,
        maker: PairMaker,
        strategy: ReferenceStrategy,
        draws: Draws,
        generation: Generation,
        judge: Callable[[Sequence[int], Tensor], Tensor] | None = None,
    ) -> None:
        self._config = config
        self._generates = config.row.negatives == "generated"
        self.maker = maker
        self._strategy = strategy
        self._draws = draws
        self.generation = generation
        self._judge = judge
        self.offload_context: Callable[[], AbstractContextManager[None]] = nullcontext
        self.waiting: dict[int, RolledOut] = {}
        self._window_share = 0.0
        self.seconds = 0.0

    @property
    def batch(self) -> int:
        """Number of samples generated at once; halved when memory runs out."""
        return self.generation.batch

    def pairs(self, update: int, reference: int | None) -> Pairs:
        """Returns this rank's pairs of an update; the first call of a window rolls out all of its updates.

        Args:
            update: the update's index, from 0.
            reference: the index of the drawn past policy; None if the method has no reference.
        """
        if reference is not None and update not in self.waiting:
            window, started = self.window(update), time.perf_counter()
            self.waiting = self._roll_out(window, update, reference)
            self._draws.prefetch(window[-1] + 1)
            self.generation.agree()  # the batch determines the windows, so it must be equal in all processes
            self._window_share = (time.perf_counter() - started) / len(self.waiting)
        started = time.perf_counter()
        made = self.waiting.pop(update, RolledOut())
        pairs = self.maker.pairs(update, self.maker.sample_ids(update), made.samples)
        uses = self._config.reference.uses
        verdict = None if made.verdicts is None else made.verdicts.repeat_interleave(uses)
        pairs = replace(pairs, ref_error=made.errors, verdict=verdict)
        self.seconds = self._window_share + time.perf_counter() - started
        return pairs

    def window(self, update: int) -> range:
        """Returns the updates that are rolled out together with `update`; they all use the same drawn reference."""
        config = self._config
        if config.reference.redraw == "update":
            return range(update, update + 1)
        ahead = config.reference.window
        if ahead is None:
            mine = max(1, config.prompts_per_update // self.maker.world)
            ahead = math.ceil(_FULL_BATCHES * self.batch / mine) if self._generates else 1
        length = config.train.updates_per_iteration
        first = update - update % length
        # Windows are counted from the draw, so that a resumed run has the same windows.
        start = first + (update - first) // ahead * ahead
        return range(start, min(start + ahead, first + length, config.train.updates))

    def _roll_out(self, window: range, first: int, reference: int) -> dict[int, RolledOut]:
        """Returns what the window's updates need from `first` on; a resumed run may start inside one."""
        assert self._draws.pool is not None
        ids = {update: self.maker.sample_ids(update) for update in window}
        keys = [(update, sample) for update in window for sample in ids[update]]
        done = sum(len(ids[update]) for update in range(window[0], first))
        with self.offload_context(), self._strategy.load_reference(self._draws.pool, reference) as model:
            samples = self.generate(model, keys, done) if self._generates else None
            made: dict[int, RolledOut] = {}
            for update in window[first - window[0] :]:
                start = (update - window[0]) * len(ids[update])
                own = None if samples is None else samples[start : start + len(ids[update])]
                pairs = partial(self.maker.pairs, update, ids[update], own)
                self.generation.check()
                errors = self._strategy.ahead(model, pairs)
                verdicts = None if own is None or self._judge is None else self._judge(ids[update], own)
                made[update] = RolledOut(own, errors, verdicts)
        return made

    def generate(self, model: nn.Module, keys: Keys, done: int = 0) -> Tensor:
        """Generates a model's samples `(len(keys), *latent)`; see `Generation`."""
        return self.generation(keys, partial(self._sample, model), done)

    def _sample(self, model: nn.Module, keys: Keys) -> Tensor:
        return self._strategy.sample(model, *self.maker.generation(keys))
