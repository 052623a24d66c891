"""Where the slabs of a pool lie: the device's memory first, then host memory, then mapped files."""

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
"""Of what is free when the first checkpoint comes, where no budget is given."""


@dataclass(frozen=True)
class Budget:
    """Bytes that checkpoints may take, by tier; None: a share of what is free when the first one comes.

    Attributes:
        device: of a GPU's memory, 0.15; the slab of the resident one comes on top.
        host: of host memory, a half.
        disk: of the folder's file system, nine tenths.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is no number of bytes."""
        for name, value in vars(self).items():
            if value is not None and (not isinstance(value, int | np.integer) or value < 0):
                raise ValueError(f"{name}: a number of bytes >= 0 or None is needed, got {value!r}")


class PoolFullError(Exception):
    """No tier has room for another checkpoint; the pool is as it was."""


class Tiers:
    """Puts slabs where there is room; one that has its place keeps it, and what one leaves the next one takes.

    All processes of a run hold the same slabs. Those in host memory and in files are one copy a machine, written by one
    process; so `put` and `replace` are called by all processes, with the same arguments.

    Attributes:
        checkpoints: by number, in the order in which they came.

    Args:
        layout: of all slabs.
        device: on which references compute.
        budget: of each tier.
        folder: in which files go; None: where temporary files go, which on some systems is memory. They lose their
            names as soon as they are mapped, so they are gone with the last process that maps them, however that ends.
        node: the processes of this machine.
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
        self._left: list[StoredCheckpoint] = []  # memory that is taken, and free

    def put(self, number: int, tensors: Mapping[str, Tensor] | Tensor) -> None:
        """One more slab, in the first tier that has room.

        Args:
            number: of the checkpoint.
            tensors: what goes into it: the tensors of the layout by name, or a slab.

        Raises:
            PoolFullError: no tier has room, or the disk refuses; says how much is needed.
        """
        stored = self._left.pop() if self._left else self._new()
        if stored is None:
            self.stored[number] = self._written(tensors)
            return
        self._settle()  # another process may still read what the slab held
        self._fill(stored.slab if stored.tier == "device" or self._node.owns else None, tensors)
        self._settle()
        self.stored[number] = stored

    def replace(self, gone: int, number: int, tensors: Mapping[str, Tensor] | Tensor) -> None:
        """`put`, with one slab making way for it; that stays where there is no room after all."""
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
        """Memory for a slab in the first tier with room; None where that is the disk."""
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
        raise PoolFullError(f"a checkpoint takes {size / 2**30:.3g} GiB; left are (GiB) {rooms}")

    def _memory(self, tier: Tier) -> Tensor | None:
        """Zeros, so that the gaps between tensors are alike in every copy; None where any process is refused them."""
        size, slab, problem = self.layout.size, None, None
        try:
            if tier == "device":
                slab = torch.zeros(size, dtype=torch.uint8, device=self.device)
            else:
                # By the number of all processes, which every one of them knows alike.
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
        warnings.warn(f"no {tier} memory for a past policy, the next tier takes it: {problem}", stacklevel=2)
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
                problem = self._node.agree(problem)  # by then all have mapped it
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
        """For all processes; one that does not write the slab has None."""
        if not isinstance(tensors, Tensor):
            self.layout.fill(slab, tensors)
        elif slab is not None:
            slab.copy_(tensors)

    def _settle(self) -> None:
        """All processes have done what they began with the slabs."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._node.wait()

    def _measured(self, budget: Budget) -> dict[Tier, int]:
        """Bytes by tier, the same in all processes."""
        existing = next(place for place in (self._folder, *self._folder.absolute().parents) if place.exists())
        rooms: dict[Tier, int] = {}
        if self.device.type == "cuda":
            rooms["device"] = _room("device", budget.device, lambda: free_bytes(self.device))
        rooms["host"] = _room("host", budget.host, lambda: free_bytes(torch.device("cpu")))
        rooms["disk"] = _room("disk", budget.disk, lambda: shutil.disk_usage(existing).free)
        return {tier: self._node.min(room) for tier, room in rooms.items()}


def _room(tier: Tier, given: int | None, free: Callable[[], int]) -> int:
    return int(SHARES[tier] * free()) if given is None else given
