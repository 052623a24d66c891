"""What a run is besides its configuration: weights, optimizer, moving average, past policies and a few numbers.

Everything else is a function of (seed, update, sample id), so a resumed run is the run that was never interrupted: bit
for bit on a CPU, and on a GPU with `model.deterministic`, with as many processes as before; else up to rounding.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.distributed.fsdp import copy_to_shard, gather_full
from seppo_fast.references.layout import trainable_state_dict
from seppo_fast.references.pool import ReferencePool
from seppo_fast.references.storage import is_saved_pool
from seppo_fast.runs.checkpoint import REFERENCES, SavedState, prune, saved_states, state_folder, write_state
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import disk_message
from seppo_fast.utils.logging import warn

POLICY, OPTIMIZER, AVERAGE = "policy", "optimizer", "average"
_MAX_FAILED = 3  # saves in a row that the disk refuses before the run stops


def on_cpu(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which nothing changes any more.

    Args:
        tensors: sharded ones are gathered, one at a time, for which all processes call this.
        keep: False in a process that only takes part in that; it gets none.
    """
    copies = {}
    for name, tensor in tensors.items():
        values = gather_full(tensor.detach())
        if keep:
            copies[name] = torch.empty(values.shape, dtype=values.dtype).copy_(values)
    return copies


def load_policy(module: nn.Module, saved: SavedState) -> None:
    """Makes a module's trained state the saved one, in place.

    Raises:
        CheckpointError: tensors that are not the module's; the module is as it was.
    """
    state = trainable_state_dict(module)
    for name, tensor in fitting(saved, POLICY, state).items():
        copy_to_shard(state[name], tensor)


def fitting(saved: SavedState, file: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of a saved state, which have the names and shapes of `own`: copying would broadcast.

    Raises:
        CheckpointError: they have others.
    """
    tensors = saved.tensors(file)
    different = sorted(
        name
        for name in {*tensors, *own}
        if name not in tensors or name not in own or tensors[name].shape != own[name].shape
    )
    if different:
        raise CheckpointError(
            f"{saved.folder / file}.safetensors: holds other weights than this model's: {', '.join(different[:5])}"
            + (", ..." if len(different) > 5 else "")
        )
    return tensors


class Saver:
    """Writes states in a thread of its own while training goes on; for one process of the run.

    Args:
        run: the run's folder.
        minutes: between two states; 0: each is due.
        keep: states that stay.
    """

    def __init__(self, run: Path, minutes: float, keep: int) -> None:
        self._run, self._seconds, self._keep = run, 60 * minutes, keep
        self._started = time.monotonic()
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._failed = 0
        self.stalled = 0.0

    def due(self) -> bool:
        """Whether enough time went by since the last state."""
        return time.monotonic() - self._started >= self._seconds

    def begins(self, update: int) -> bool:
        """Whether a state is still to be saved; until the one before is written, it waits.

        Raises:
            CheckpointError: as `wait`.
        """
        self.wait()
        if state_folder(self._run, update).exists():
            return False
        self._started = time.monotonic()
        return True

    def save(
        self,
        update: int,
        files: Mapping[str, Mapping[str, Tensor]],
        numbers: Mapping[str, Any],
        references: ReferencePool | None,
    ) -> None:
        """Starts writing a state that `begins`: `on_cpu`; nothing may add to `references` before `wait`."""
        self._thread = threading.Thread(target=self._write, args=(update, files, dict(numbers), references))
        self._thread.start()
        self.stalled += time.monotonic() - self._started

    def wait(self, last: bool = False) -> None:
        """Until the state that is being written is there.

        Args:
            last: whether no other one will be written.

        Raises:
            CheckpointError: the third state in a row that could not be written, or the last.
        """
        if self._thread is None:
            return
        began = time.monotonic()
        self._thread.join()
        self._thread = None
        self.stalled += time.monotonic() - began
        problem, self._problem = self._problem, None
        if problem is None:
            self._failed = 0
            return
        self._failed += 1
        if last or self._failed == _MAX_FAILED or not isinstance(problem, CheckpointError):
            raise problem
        warn(f"the run goes on, and its state could not be saved: {problem}")

    def _write(
        self,
        update: int,
        files: Mapping[str, Mapping[str, Tensor]],
        numbers: Mapping[str, Any],
        references: ReferencePool | None,
    ) -> None:
        try:
            fault("save")
            before = next((folder / REFERENCES for folder in saved_states(self._run)), None)
            previous = before if before is not None and is_saved_pool(before) else None
            write_references = None if references is None else partial(references.save, previous=previous)
            write_state(state_folder(self._run, update), files, numbers, write_references)
        except OSError as problem:
            self._problem = CheckpointError(disk_message(self._run, problem))
        except Exception as problem:  # for the thread that trains
            self._problem = problem
        else:
            self._prune()

    def _prune(self) -> None:
        try:
            prune(self._run, self._keep)
        except (OSError, CheckpointError) as problem:
            warn(f"an older state could not be removed: {problem}")
