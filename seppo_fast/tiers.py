"""Where the slabs of a pool lie: the device's memory first, then host memory, then mapped files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from seppo_fast.files import disk_message
from seppo_fast.memory import free_bytes, pinned_bytes
from seppo_fast.pool_files import Member, Tier, map_member, member_name, write_member
from seppo_fast.slab import Table

# Of what is free when the first checkpoint comes, where no budget is given.
_SHARES: dict[Tier, float] = {"device": 0.25, "host": 0.5, "disk": 0.9}


@dataclass(frozen=True)
class Budget:
    """Bytes that checkpoints may take, by tier; None: a share of what is free when the first one comes.

    Attributes:
        device: of a GPU's memory, a quarter; the slab of the resident one comes on top.
        host: of host memory, a half.
        disk: of the folder's file system, nine tenths.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None


class PoolFullError(Exception):
    """No tier has room for another checkpoint; the pool is as it was."""


class Tiers:
    """Puts slabs where there is room; one that has its place keeps it, and what one leaves the next one takes.

    Attributes:
        members: by number, in the order in which they came.

    Args:
        table: of all slabs.
        device: on which references compute.
        budget: of each tier.
        folder: under which files go, in a folder of their own; None: where temporary files go.
    """

    def __init__(self, table: Table, device: torch.device, budget: Budget, folder: Path | None) -> None:
        self.table = table
        self.device = device
        self._parent = folder or Path(tempfile.gettempdir())
        self._folder: Path | None = None
        self._rooms = self._measured(budget)
        self.members: dict[int, Member] = {}
        self._left: list[tuple[Tier, Tensor]] = []  # memory that is taken, and free

    def put(self, number: int, tensors: Mapping[str, Tensor] | Tensor) -> None:
        """One more slab, in the first tier that has room.

        Args:
            number: of the checkpoint.
            tensors: what goes into it: the tensors of the table by name, or a slab.

        Raises:
            PoolFullError: no tier has room, or the disk refuses; says how much is needed.
        """
        tier, slab = self._left.pop() if self._left else self._new()
        if isinstance(tensors, Tensor):
            slab.copy_(tensors)
        else:
            self.table.fill(slab, tensors)
        self.members[number] = self._written(number, slab) if tier == "disk" else Member(tier, slab)

    def discard(self, number: int) -> None:
        """A slab makes way; its file is gone, its memory is for the next one."""
        member = self.members.pop(number)
        if member.file is None:
            self._left.append((member.tier, member.slab))
        else:
            member.file.unlink(missing_ok=True)
            self._rooms["disk"] += self.table.size

    def close(self) -> None:
        """Frees all memory and deletes the files."""
        self.members.clear()
        self._left.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self) -> tuple[Tier, Tensor]:
        """The first tier with room and a slab for it: zeros, so that the gaps between tensors are alike in all."""
        size = self.table.size
        tier = next((tier for tier, room in self._rooms.items() if room >= size), None)
        if tier is None:
            rooms = ", ".join(f"{tier} {room / 2**30:.3g}" for tier, room in self._rooms.items())
            raise PoolFullError(f"a checkpoint takes {size / 2**30:.3g} GiB; left are (GiB) {rooms}")
        if tier == "host" and self.device.type == "cuda":
            slab = pinned_bytes(size)
        else:
            slab = torch.zeros(size, dtype=torch.uint8, device=self.device if tier == "device" else "cpu")
        if tier != "disk":
            self._rooms[tier] -= size
        return tier, slab

    def _written(self, number: int, slab: Tensor) -> Member:
        try:
            if self._folder is None:
                self._parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="seppo-references-", dir=self._parent))
            file = self._folder / member_name(number)
            write_member(file, slab, self.table)
        except (OSError, SafetensorError) as problem:
            raise PoolFullError(disk_message(self._folder or self._parent, problem)) from problem
        self._rooms["disk"] -= self.table.size
        return Member("disk", map_member(file)[0], file)

    def _measured(self, budget: Budget) -> dict[Tier, int]:
        existing = next(place for place in (self._parent, *self._parent.absolute().parents) if place.exists())
        rooms: dict[Tier, int] = {}
        if self.device.type == "cuda":
            rooms["device"] = _room("device", budget.device, lambda: free_bytes(self.device))
        rooms["host"] = _room("host", budget.host, lambda: free_bytes(torch.device("cpu")))
        rooms["disk"] = _room("disk", budget.disk, lambda: shutil.disk_usage(existing).free)
        return rooms


def _room(tier: Tier, given: int | None, free: Callable[[], int]) -> int:
    return int(_SHARES[tier] * free()) if given is None else given
