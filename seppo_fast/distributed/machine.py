"""The processes of one machine, which keep one copy of the past policies together."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seppo_fast.utils.files import allocate

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # names a machine; host names need not differ


class Node:
    """Which processes share this machine, and what they must agree on. Every method is called by all processes.

    Args:
        gather: one value of each process in, those of all out, in the order of their ranks; it waits for all.
        rank: of this process.

    Attributes:
        rank: of this process.
        world: processes of the run.
        owns: whether this process is the one that writes what they share.
    """

    def __init__(self, gather: Callable[[Any], list[Any]] = lambda value: [value], rank: int = 0) -> None:
        self._gather = gather
        self.rank = rank
        self.world = len(gather(rank))
        here = (_BOOT.read_text(), os.readlink("/proc/self/ns/pid")) if self.world > 1 else None
        self._owner = gather(here).index(here)
        self.owns = rank == self._owner

    def wait(self) -> None:
        """Until all processes are here."""
        self._gather(None)

    def agree(self, problem: str | None) -> str | None:
        """None where no process has a problem, else one's."""
        return next((other for other in self._gather(problem) if other is not None), None)

    def same(self, value: Any) -> bool:
        """Whether all processes have the same value."""
        return all(other == value for other in self._gather(value))

    def min(self, value: int) -> int:
        """The smallest of all processes' values."""
        return min(self._gather(value))

    def first(self, value: Any) -> Any:
        """The value of the process of rank 0."""
        return self._gather(value)[0]

    def from_owner(self, value: Any) -> Any:
        """The value of the process of this machine that owns."""
        return self._gather(value)[self._owner]

    def shared_bytes(self, size: int) -> Tensor | None:
        """Host memory `(size,)` uint8, zeros, of all processes of this machine; None where some has none.

        It has no name, so it is gone with the last process that maps it, however that ends.
        """
        handle, place = -1, None
        if self.owns:
            try:
                handle = os.memfd_create("seppo-references")
                allocate(handle, size)  # else a page that is not there kills us when it is touched
                place = f"/proc/{os.getpid()}/fd/{handle}", os.fstat(handle).st_ino
            except OSError:
                place = None
        place = self.from_owner(place)
        memory, problem = None, None
        try:
            if place is None:
                raise OSError("no memory")
            if not self.owns:
                handle = os.open(place[0], os.O_RDWR)
            if os.fstat(handle).st_ino != place[1]:
                raise OSError("another process's file")
            memory = mmap.mmap(handle, size)
        except OSError as error:
            problem = str(error)
        problem = self.agree(problem)  # by then all have opened it
        if handle >= 0:
            os.close(handle)
        return None if problem or memory is None else torch.frombuffer(memory, dtype=torch.uint8)
