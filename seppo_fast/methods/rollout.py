"""Rolling out ahead: the drawn reference's samples, and its errors on them, for several coming updates at once.

A drawn reference is frozen, so what depends on it alone can be made before the policy trains, with its weights
resident: samples in batches as large as the device likes, whatever the training batch; errors in the learner's own
micro-batches (see `reference_errors`). What is left per pair for the learner is one latent and two numbers; all
else is a function of (seed, update, sample id) and is made again when it is needed.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

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

_FULL_BATCHES = 8  # rolled out at once: the last, unfilled one then wastes an eighth at most


class Rollout:
    """Makes the pairs of each update, as many updates ahead as fill the sampling batches.

    Attributes:
        batch: samples generated at once; halved where memory is short.
        seconds: that the last update's pairs took, an equal share of its window's.
        maker: makes the pairs up to the reference's share.
        waiting: samples and errors of the updates that were rolled out ahead, by update.
        offload_context: entered while a reference is resident, to free device memory that only the learner needs.

    Args:
        config: the run's configuration, its batches chosen.
        maker: see above.
        strategy: how the reference generates, and where and when its errors are made.
        draws: the past policies, and which of them is drawn next.
        processes: those of the run.
        interruption: asked before each batch; what it raises leaves everything as it was.
    """

    def __init__(
        self,
        config: Config,
        maker: PairMaker,
        strategy: ReferenceStrategy,
        draws: Draws,
        processes: Processes,
        interruption: Interruption,
    ) -> None:
        assert config.sampler.batch is not None, "the sampling batch is chosen before"
        self._config = config
        self._generates = config.row.negatives == "generated"
        self.maker = maker
        self._strategy = strategy
        self._draws = draws
        self._processes = processes
        self._interruption = interruption
        self.offload_context: Callable[[], AbstractContextManager[None]] = nullcontext
        self.batch = config.sampler.batch
        self.waiting: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self._window_share = 0.0
        self.seconds = 0.0

    def pairs(self, update: int, reference: int | None) -> Pairs:
        """This rank's pairs of an update, for the drawn reference; the first of a window rolls out all of it."""
        if reference is not None and update not in self.waiting:
            window, started = self.window(update), time.perf_counter()
            self.waiting = self._roll_out(window, update, reference)
            self._draws.prefetch(window[-1] + 1)
            # One process may have found less memory; windows follow the batch, and must be the same for all.
            self.batch = self._processes.min(self.batch)
            self._window_share = (time.perf_counter() - started) / len(self.waiting)
        started = time.perf_counter()
        samples, errors = self.waiting.pop(update, (None, None))
        pairs = replace(self.maker.pairs(update, self.maker.sample_ids(update), samples), ref_error=errors)
        self.seconds = self._window_share + time.perf_counter() - started
        return pairs

    def window(self, update: int) -> range:
        """The updates that are rolled out with `update`: never beyond the next draw of a reference."""
        config = self._config
        if config.reference.redraw == "update":
            return range(update, update + 1)
        ahead = config.reference.window
        if ahead is None:
            mine = max(1, config.train.pairs_per_update // config.reference.uses // self._processes.world)
            ahead = math.ceil(_FULL_BATCHES * self.batch / mine) if self._generates else 1
        length = config.train.updates_per_iteration
        first = update - update % length
        # A grid that starts at the draw, so that windows are the same wherever a run goes on.
        start = first + (update - first) // ahead * ahead
        return range(start, min(start + ahead, first + length, config.train.updates))

    def _roll_out(self, window: range, first: int, reference: int) -> dict[int, tuple[Tensor | None, Tensor | None]]:
        """Samples and errors of the window's updates from `first` on, which is not the window's where a run goes on."""
        assert self._draws.pool is not None
        ids = {update: self.maker.sample_ids(update) for update in window}
        keys = [(update, sample) for update in window for sample in ids[update]]
        done = sum(len(ids[update]) for update in range(window[0], first))
        with self.offload_context(), self._strategy.load_reference(self._draws.pool, reference) as model:
            samples = self._generate(model, keys, done) if self._generates else None
            made: dict[int, tuple[Tensor | None, Tensor | None]] = {}
            for update in window[first - window[0] :]:
                start = (update - window[0]) * len(ids[update])
                own = None if samples is None else samples[start : start + len(ids[update])]
                pairs = partial(self.maker.pairs, update, ids[update], own)
                self._interruption.check()
                made[update] = own, self._strategy.ahead(model, pairs)
        return made

    def _generate(self, model: nn.Module, keys: list[tuple[int, int]], done: int) -> Tensor:
        """Samples `(len(keys), *latent)` for (update, sample id), in batches that halve where memory is short.

        The first `done` are not asked for. Batches are those that make them all: rounding depends on a batch's size.
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
        """Host memory for samples, pinned beside a GPU; a nameless file where the budget does not hold them."""
        count = math.prod(shape)
        budget = self._config.reference.pairs_gib
        # The other processes of a machine have samples of their own.
        allowed = free_bytes(torch.device("cpu")) // 4 // self._processes.world if budget is None else budget * 2**30
        if 4 * count <= allowed:
            return torch.empty(shape, pin_memory=self._strategy.device.type == "cuda")
        folder = Path(self._config.data.cache)  # a real disk; what is called temporary may be memory
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix="seppo-samples-") as file:
                allocate(file.fileno(), 4 * count)  # a mapped file that finds no space later would kill us
                return torch.from_file(file.name, shared=True, size=count).view(shape)  # lives on without its name
        except OSError as problem:
            raise CheckpointError(disk_message(folder, problem)) from problem
