"""Generates the drawn reference's samples, and its denoising errors, for several coming updates at once.

A drawn reference is frozen, so everything that depends on it alone can be computed before the policy trains, while its
weights are on the device: samples in batches of any size that fits, independent of the training batch, and errors in
the learner's own micro-batches (see `reference_errors`). Only one latent and two numbers per pair are kept for the
learner. Everything else is a function of (seed, update, sample id) and is recomputed when needed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.draws import Draws
from seppo_fast.methods.pairs import PairMaker, Pairs
from seppo_fast.methods.reference_errors import ReferenceStrategy
from seppo_fast.runs.signals import Interruption
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import allocate, disk_message
from seppo_fast.utils.logging import warn
from seppo_fast.utils.memory import free_bytes, is_out_of_memory
from seppo_fast.utils.progress import progress

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
        batch: number of samples generated at once; halved when memory runs out.
        seconds: time that the last update's pairs took, including an equal share of its window's rollout.
        maker: makes the pairs, except for the reference's samples and errors.
        waiting: what was computed for updates that were rolled out ahead, by update.
        offload_context: entered while a reference is resident, to free device memory that only the learner needs.

    Args:
        config: the run's configuration, with its batch sizes chosen.
        maker: see above.
        strategy: generates the reference's samples, and computes its errors ahead if `reference.errors` is "ahead".
        draws: the past policies; starts copying the next drawn one to the device.
        processes: the run's processes.
        interruption: checked before each batch; if it raises, the policy and the pairs in `waiting` are unchanged.
        judge: returns the verdicts on an update's samples, given their ids; None if no scorer is asked.
    """

    def __init__(
        self,
        config: Config,
        maker: PairMaker,
        strategy: ReferenceStrategy,
        draws: Draws,
        processes: Processes,
        interruption: Interruption,
        judge: Callable[[Sequence[int], Tensor], Tensor] | None = None,
    ) -> None:
        assert config.sampler.batch is not None, "sampler.batch must be chosen by now"
        self._config = config
        self._generates = config.row.negatives == "generated"
        self.maker = maker
        self._strategy = strategy
        self._draws = draws
        self._processes = processes
        self._interruption = interruption
        self._judge = judge
        self.offload_context: Callable[[], AbstractContextManager[None]] = nullcontext
        self.batch = config.sampler.batch
        self.waiting: dict[int, RolledOut] = {}
        self._window_share = 0.0
        self.seconds = 0.0

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
            # One process may have run out of memory. The batch determines the windows, so it must be equal in all.
            self.batch = self._processes.min(self.batch)
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
            mine = max(1, config.train.pairs_per_update // config.reference.uses // self._processes.world)
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
                self._interruption.check()
                errors = self._strategy.ahead(model, pairs)
                verdicts = None if own is None or self._judge is None else self._judge(ids[update], own)
                made[update] = RolledOut(own, errors, verdicts)
        return made

    def generate(self, model: nn.Module, keys: list[tuple[int, int]], done: int = 0) -> Tensor:
        """Generates samples `(len(keys), *latent)` for keys (update, sample id); halves the batch if memory runs out.

        The first `done` samples are not needed, and those whose batches lie before them entirely are left undefined.
        The other batches are the same as without `done`, because rounding depends on the batch.
        """
        samples: Tensor | None = None
        start = done - done % self.batch
        with progress(len(keys), "rolled out", "samples", initial=start) as advance:
            while start < len(keys):
                self._interruption.check()
                inputs = self.maker.generation(keys[start : start + self.batch])
                try:
                    fault("sampling")
                    made = self._strategy.sample(model, *inputs)
                except (RuntimeError, MemoryError) as error:
                    if len(inputs[0]) == 1 or not is_out_of_memory(error):
                        raise
                    self.batch = len(inputs[0]) // 2
                    warn(f"out of memory with {len(inputs[0])} samples; continuing with sampler.batch = {self.batch}")
                    continue
                if samples is None:
                    samples = self._sample_buffer((len(keys), *made.shape[1:]))
                samples[start : start + len(made)] = made
                start += len(made)
                advance(len(made))
        assert samples is not None
        return samples

    def _sample_buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Returns host memory for samples, pinned if a GPU is used; a mapped, unlinked file if they exceed the budget.

        Raises:
            CheckpointError: the file cannot be written.
        """
        count = math.prod(shape)
        budget = self._config.reference.pairs_gib
        # Each process on a machine has its own samples.
        allowed = free_bytes(torch.device("cpu")) // 4 // self._processes.world if budget is None else budget * 2**30
        if 4 * count <= allowed:
            return torch.empty(shape, pin_memory=self._strategy.device.type == "cuda")
        folder = Path(self._config.data.cache)  # on a disk, whereas the system's temporary folder may be in memory
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix="seppo-samples-") as file:
                allocate(file.fileno(), 4 * count)  # else a full disk would kill the process with SIGBUS later
                return torch.from_file(file.name, shared=True, size=count).view(shape)  # the mapping outlives the name
        except OSError as problem:
            raise CheckpointError(disk_message(folder, problem)) from problem
