"""Groups processes by machine, so that those of one machine share one copy of the past policies in host memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seppo_fast.utils.files import allocate

_BOOT = Path("/proc/sys/kernel/random/boot_id")  # identifies a machine; two machines may have the same host name


class Node:
    """Groups the run's processes by machine and lets them agree on values.

    Every method is a collective: all processes must call it. Containers with separate PID namespaces count as separate
    machines, since a process opens the shared memory through its owner's `/proc` entry.

    Args:
        gather: a collective that gets one value from each process and returns the values of all, in order of rank.
        rank: this process's rank.

    Attributes:
        rank: this process's rank.
        world: number of processes of the run.
        owns: whether this process is its machine's owner: the one that creates and writes the shared memory.
    """

    def __init__(self, gather: Callable[[Any], list[Any]] = lambda value: [value], rank: int = 0) -> None:
        self._gather = gather
        self.rank = rank
        self.world = len(gather(rank))
        here = (_BOOT.read_text(), os.readlink("/proc/self/ns/pid")) if self.world > 1 else None
        self._owner = gather(here).index(here)
        self.owns = rank == self._owner

    def wait(self) -> None:
        """Waits until all processes have called this."""
        self._gather(None)

    def agree(self, problem: str | None) -> str | None:
        """Returns, in all processes, the problem of the lowest rank that has one; None if no process has a problem."""
        return next((other for other in self._gather(problem) if other is not None), None)

    def same(self, value: Any) -> bool:
        """Returns whether all processes have the same value."""
        return all(other == value for other in self._gather(value))

    def min(self, value: int) -> int:
        """Returns the smallest of all processes' values."""
        return min(self._gather(value))

    def first(self, value: Any) -> Any:
        """Returns rank 0's value."""
        return self._gather(value)[0]

    def from_owner(self, value: Any) -> Any:
        """Returns the value of this machine's owner."""
        return self._gather(value)[self._owner]

    def shared_bytes(self, size: int) -> Tensor | None:
        """Returns host memory that all processes of this machine share: a `(size,)` tensor of uint8, all zeros.

        The memory has no file name, so it is freed with the last process that maps it, however that process ends.

        Returns:
            The tensor, or None in all processes if any of them could not get the memory.
        """
        handle, place = -1, None
        if self.owns:
            try:
                handle = os.memfd_create("seppo-references")
                allocate(handle, size)  # otherwise, touching a page that the kernel cannot provide kills the process
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
        problem = self.agree(problem)  # collective: after it, all processes have opened the file
        if handle >= 0:
            os.close(handle)
        return None if problem or memory is None else torch.frombuffer(memory, dtype=torch.uint8)
