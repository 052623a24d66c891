"""Generates samples in batches of any size that fits; the size is halved when memory runs out."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from seppo_fast.config.schema import Config
from seppo_fast.distributed.processes import Processes
from seppo_fast.runs.signals import Interruption
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import allocate, disk_message
from seppo_fast.utils.logging import warn
from seppo_fast.utils.memory import free_bytes, is_out_of_memory
from seppo_fast.utils.progress import progress

Keys = Sequence[tuple[int, ...]]
"""The keys of samples: (update, sample id), and a number if several samples belong to one id."""


class Generation:
    """Generates samples in batches.

    Attributes:
        batch: number of samples generated at once.

    Args:
        config: the run's configuration, with its batch sizes chosen.
        processes: the run's processes.
        interruption: checked before each batch; if it raises, nothing has changed.
    """

    def __init__(self, config: Config, processes: Processes, interruption: Interruption) -> None:
        assert config.sampler.batch is not None, "sampler.batch must be chosen by now"
        self._config = config
        self._processes = processes
        self._interruption = interruption
        self.batch = config.sampler.batch

    def __call__(self, keys: Keys, sample: Callable[[Keys], Tensor], done: int = 0) -> Tensor:
        """Generates what belongs to each key; halves the batch if memory runs out.

        The first `done` samples are not needed, and those whose batches lie before them entirely are left undefined.
        The other batches are the same as without `done`, because rounding depends on the batch.

        Args:
            keys: the keys, at least one.
            sample: generates a batch, `(B, ...)` float32 on the CPU, from its keys.
            done: see above.

        Returns:
            `(len(keys), ...)`; see `_buffer`.
        """
        samples: Tensor | None = None
        start = done - done % self.batch
        with progress(len(keys), "rolled out", "samples", initial=start) as advance:
            while start < len(keys):
                self._interruption.check()
                now = keys[start : start + self.batch]
                try:
                    fault("sampling")
                    made = sample(now)
                except (RuntimeError, MemoryError) as error:
                    if len(now) == 1 or not is_out_of_memory(error):
                        raise
                    self.batch = len(now) // 2
                    warn(f"out of memory with {len(now)} samples; continuing with sampler.batch = {self.batch}")
                    continue
                if samples is None:
                    samples = self._buffer((len(keys), *made.shape[1:]))
                samples[start : start + len(made)] = made
                start += len(made)
                advance(len(made))
        assert samples is not None
        return samples

    def check(self) -> None:
        """Checks for an interruption, before other work of a rollout."""
        self._interruption.check()

    def agree(self) -> None:
        """Sets the batch to the smallest of all processes': one of them may have run out of memory."""
        self.batch = self._processes.min(self.batch)

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        """Returns host memory for samples, pinned if a GPU is used; a mapped, unlinked file if they exceed the budget.

        Raises:
            CheckpointError: the file cannot be written.
        """
        count = math.prod(shape)
        budget = self._config.reference.pairs_gib
        # Each process on a machine has its own samples.
        allowed = free_bytes(torch.device("cpu")) // 4 // self._processes.world if budget is None else budget * 2**30
        if 4 * count <= allowed:
            return torch.empty(shape, pin_memory=self._processes.device.type == "cuda")
        folder = Path(self._config.data.cache)  # on a disk, whereas the system's temporary folder may be in memory
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix="seppo-samples-") as file:
                allocate(file.fileno(), 4 * count)  # else a full disk would kill the process with SIGBUS later
                return torch.from_file(file.name, shared=True, size=count).view(shape)  # the mapping outlives the name
        except OSError as problem:
            raise CheckpointError(disk_message(folder, problem)) from problem
