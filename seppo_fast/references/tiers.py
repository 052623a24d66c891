"""Placement of a pool's slabs: in device memory first, then in host memory, then in memory-mapped files."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from seppo_fast.distributed.machine import Node
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.storage import StoredCheckpoint, Tier, checkpoint_name, map_checkpoint, write_checkpoint
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import disk_message
from seppo_fast.utils.memory import free_bytes, host_bytes, page_locked

SHARES: dict[Tier, float] = {"device": 0.15, "host": 0.5, "disk": 0.9}
"""For tiers without a budget: the share that checkpoints may take of what is free when the first one is added."""


@dataclass(frozen=True)
class Budget:
    """Bytes that checkpoints may take, by tier; None: a share of what is free when the first one is added.

    Attributes:
        device: GPU memory, 0.15 of what is free by default; the slab of the resident checkpoint comes on top.
        host: host memory, half of what is free by default.
        disk: space on the folder's file system, nine tenths of what is free by default.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None

    def __post_init__(self) -> None:
        """Raises a ValueError for a budget that is not a number of bytes."""
        for name, value in vars(self).items():
            if value is not None and (not isinstance(value, int | np.integer) or value < 0):
                raise ValueError(f"{name}: must be a number of bytes >= 0 or None, got {value!r}")


class PoolFullError(Exception):
    """No tier has room for another checkpoint; the pool is unchanged."""


class Tiers:
    """Puts slabs where there is room. A slab is never moved; freed memory is reused.

    All processes of a run hold the same slabs. Of a slab in host memory or in a file there is one copy per machine,
    written by one process; so all processes must call `put` and `replace`, with the same arguments.

    Attributes:
        stored: the stored checkpoints by number, in the order in which they were added.

    Args:
        layout: the layout of all slabs.
        device: the device on which references compute.
        budget: bytes that each tier may take.
        folder: the folder for files; None: the directory for temporary files, which on some systems is in memory. Files
            lose their names as soon as they are mapped, so they are freed with the last process that maps them, however
            that process ends.
        node: the run's processes.
    """

    def __init__(
        self, layout: PackedLayout, device: torch.device, budget: Budget, folder: Path | None, node: Node
    ) -> None:
        self.layout = layout
        self.device = device
        self._folder = folder or Path(tempfile.gettempdir())
        self._node = node
        self._rooms = self._measured(budget)
        self.stored: dict[int, StoredCheckpoint] = {}
        self._left: list[StoredCheckpoint] = []  # memory that is allocated but holds no checkpoint

    def put(self, number: int, tensors: Mapping[str, Tensor] | Tensor) -> None:
        """Adds a slab in the first tier that has room.

        Args:
            number: the checkpoint's number.
            tensors: the slab's content: the layout's tensors by name, or another slab.

        Raises:
            PoolFullError: no tier has room, or the disk refuses the write; the message says how much is needed.
        """
        stored = self._left.pop() if self._left else self._new()
        if stored is None:
            self.stored[number] = self._written(tensors)
            return
        self._settle()  # another process may still be reading what the slab held
        self._fill(stored.slab if stored.tier == "device" or self._node.owns else None, tensors)
        self._settle()
        self.stored[number] = stored

    def replace(self, gone: int, number: int, tensors: Mapping[str, Tensor] | Tensor) -> None:
        """Puts a slab in place of checkpoint `gone`, which stays if that fails; see `put`."""
        stored = self.stored.pop(gone)
        if stored.tier == "disk":
            self._rooms["disk"] += self.layout.size
        else:
            self._left.append(stored)
        try:
            self.put(number, tensors)
        except BaseException:
            if stored.tier == "disk":
                self._rooms["disk"] -= self.layout.size
            elif stored in self._left:
                self._left.remove(stored)
            self.stored = dict(sorted({**self.stored, gone: stored}.items()))
            raise

    def close(self) -> None:
        """Frees all memory and files."""
        self.stored.clear()
        self._left.clear()

    def _new(self) -> StoredCheckpoint | None:
        """Returns memory for a slab in the first tier with room, or None if that tier is the disk."""
        size = self.layout.size
        for tier, room in self._rooms.items():
            if room < size:
                continue
            if tier == "disk":
                return None
            slab = self._memory(tier)
            self._rooms[tier] = room - size if slab is not None else 0
            if slab is not None:
                return StoredCheckpoint(tier, slab)
        rooms = ", ".join(f"{tier} {room / 2**30:.3g}" for tier, room in self._rooms.items())
        raise PoolFullError(f"a checkpoint takes {size / 2**30:.3g} GiB; room left (GiB): {rooms}")

    def _memory(self, tier: Tier) -> Tensor | None:
        """Returns zeros, so that gaps between tensors are equal in all copies; None if any process gets no memory."""
        size, slab, problem = self.layout.size, None, None
        try:
            if tier == "device":
                slab = torch.zeros(size, dtype=torch.uint8, device=self.device)
            else:
                # Decided by the number of all processes, so that all of them decide alike.
                slab = host_bytes(size) if self._node.world == 1 else self._node.shared_bytes(size)
                if slab is None:
                    problem = "no shared memory"
                elif self.device.type == "cuda":
                    slab = page_locked(slab)
        except (OSError, RuntimeError) as error:
            problem = str(error)
        problem = self._node.agree(problem)
        if problem is None:
            return slab
        warnings.warn(f"no {tier} memory for a past policy, so it goes to the next tier: {problem}", stacklevel=2)
        return None

    def _written(self, tensors: Mapping[str, Tensor] | Tensor) -> StoredCheckpoint:
        problem, slab, file, mapped = None, None, None, None
        try:
            if self._node.owns:
                slab = torch.zeros(self.layout.size, dtype=torch.uint8)
        except RuntimeError as error:
            problem = str(error)
        self._fill(slab, tensors)
        try:
            if slab is not None:
                file = self._write(slab)
        except (OSError, SafetensorError, RuntimeError) as error:
            problem = disk_message(self._folder, error)
        try:
            problem, place = self._node.agree(problem), self._node.from_owner(file)
            if problem is None:
                try:
                    mapped = map_checkpoint(place)[0]
                except CheckpointError as error:
                    problem = str(error)
                problem = self._node.agree(problem)  # collective: after it, all have mapped the file
        finally:
            if file is not None:
                shutil.rmtree(file.parent, ignore_errors=True)
        if problem is not None or mapped is None:
            raise PoolFullError(problem)
        self._rooms["disk"] -= self.layout.size
        return StoredCheckpoint("disk", mapped)

    def _write(self, slab: Tensor) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".seppo-reference-", dir=self._folder))
        try:
            write_checkpoint(folder / checkpoint_name(0), slab, self.layout)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder / checkpoint_name(0)

    def _fill(self, slab: Tensor | None, tensors: Mapping[str, Tensor] | Tensor) -> None:
        """Fills a slab; all processes call this, with None in those that do not write it."""
        if not isinstance(tensors, Tensor):
            self.layout.fill(slab, tensors)
        elif slab is not None:
            slab.copy_(tensors)

    def _settle(self) -> None:
        """Waits until all processes have finished what they started with the slabs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._node.wait()

    def _measured(self, budget: Budget) -> dict[Tier, int]:
        """Returns the bytes that each tier may take, the same in all processes."""
        existing = next(place for place in (self._folder, *self._folder.absolute().parents) if place.exists())
        rooms: dict[Tier, int] = {}
        if self.device.type == "cuda":
            rooms["device"] = _room("device", budget.device, lambda: free_bytes(self.device))
        rooms["host"] = _room("host", budget.host, lambda: free_bytes(torch.device("cpu")))
        rooms["disk"] = _room("disk", budget.disk, lambda: shutil.disk_usage(existing).free)
        return {tier: self._node.min(room) for tier, room in rooms.items()}


def _room(tier: Tier, given: int | None, free: Callable[[], int]) -> int:
    return int(SHARES[tier] * free()) if given is None else given
