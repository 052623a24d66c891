"""Saves and loads a run's state: weights, optimizer, moving average, past policies and a few numbers.

Everything else is a function of the configuration and (seed, update, sample id). With the same number of processes, a
resumed run therefore equals an uninterrupted one bit for bit on a CPU, and on a GPU with `model.deterministic`; in all
other cases up to rounding.
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
_MAX_FAILED = 3  # the run stops after this many failed saves in a row


def on_cpu(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Returns contiguous copies on the CPU, which share no memory with the originals.

    Args:
        tensors: tensors by name; sharded ones are gathered one at a time, so all processes must call this.
        keep: False for a process that only takes part in gathering; it gets an empty dictionary.
    """
    copies = {}
    for name, tensor in tensors.items():
        values = gather_full(tensor.detach())
        if keep:
            copies[name] = torch.empty(values.shape, dtype=values.dtype).copy_(values)
    return copies


def load_policy(module: nn.Module, saved: SavedState) -> None:
    """Loads the saved policy into a module's trained tensors, in place.

    Raises:
        CheckpointError: names or shapes do not match the module's; the module is unchanged.
    """
    state = trainable_state_dict(module)
    for name, tensor in fitting(saved, POLICY, state).items():
        copy_to_shard(state[name], tensor)


def fitting(saved: SavedState, file: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of a state's file after comparing names and shapes with `own`, as copying would broadcast.

    Raises:
        CheckpointError: names or shapes differ; the message lists the first five.
    """
    tensors = saved.tensors(file)
    different = sorted(
        name
        for name in {*tensors, *own}
        if name not in tensors or name not in own or tensors[name].shape != own[name].shape
    )
    if different:
        raise CheckpointError(
            f"{saved.folder / file}.safetensors: does not match this model's weights: {', '.join(different[:5])}"
            + (", ..." if len(different) > 5 else "")
        )
    return tensors


class Saver:
    """Writes states in a background thread while training continues; used by one process of the run.

    Args:
        run: the run's folder.
        minutes: time between two states; 0 saves one after every update.
        keep: number of states to keep.

    Attributes:
        stalled: seconds for which training waited for saving, so far.
    """

    def __init__(self, run: Path, minutes: float, keep: int) -> None:
        self._run, self._seconds, self._keep = run, 60 * minutes, keep
        self._started = time.monotonic()
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self._failed = 0
        self.stalled = 0.0

    def due(self) -> bool:
        """Returns whether it is time to save another state."""
        return time.monotonic() - self._started >= self._seconds

    def begins(self, update: int) -> bool:
        """Waits for the previous state, then returns whether the state after `update` still has to be saved.

        Raises:
            CheckpointError: see `wait`.
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
        links: Mapping[str, Path] | None = None,
    ) -> None:
        """Starts writing a state; call it after `begins` returned True.

        Args:
            update: number of finished updates.
            files: the results of `on_cpu`, by file name without suffix.
            numbers: everything that is not a tensor.
            references: the pool of past policies, if there is one; nothing may be added to it before `wait`.
            links: files that exist already and never change, under the names that they get in the state.
        """
        contents = update, files, dict(numbers), references, dict(links or {})
        self._thread = threading.Thread(target=self._write, args=contents)
        self._thread.start()
        self.stalled += time.monotonic() - self._started

    def wait(self, last: bool = False) -> None:
        """Waits until the state that is being written is complete.

        Args:
            last: whether no other state will be written after it.

        Raises:
            CheckpointError: the state could not be written, and it is the third in a row or the last one.
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
        warn(f"the state could not be saved; training continues: {problem}")

    def _write(
        self,
        update: int,
        files: Mapping[str, Mapping[str, Tensor]],
        numbers: Mapping[str, Any],
        references: ReferencePool | None,
        links: Mapping[str, Path],
    ) -> None:
        try:
            fault("save")
            before = next((folder / REFERENCES for folder in saved_states(self._run)), None)
            previous = before if before is not None and is_saved_pool(before) else None
            write_references = None if references is None else partial(references.save, previous=previous)
            write_state(state_folder(self._run, update), files, numbers, write_references, links)
        except OSError as problem:
            self._problem = CheckpointError(disk_message(self._run, problem))
        except Exception as problem:  # raised by `wait`, in the training thread
            self._problem = problem
        else:
            self._prune()

    def _prune(self) -> None:
        try:
            prune(self._run, self._keep)
        except (OSError, CheckpointError) as problem:
            warn(f"an older state could not be removed: {problem}")
