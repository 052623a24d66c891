"""Work that several processes share through files alone: who does which piece, and who writes a folder's files."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import NO_LOCKS, disk_message, remove_temporary


def unfinished(lock: Path, pieces: int, done: Callable[[int], bool], rank: int = 0, world: int = 1) -> Iterator[int]:
    """Yields the numbers of the pieces of work that this process has to do; at the end all pieces are done.

    Each piece is locked while its number is yielded. A piece that another process is working on is waited for, and is
    yielded after all if that process ends without finishing it. Locks end with the process that holds them.

    Args:
        lock: the lock file; piece number n locks its byte n.
        pieces: the number of pieces.
        done: returns whether a piece is done, judging by files.
        rank: this process's rank: the first pieces that it takes are those of its share.
        world: the number of processes.

    Raises:
        CheckpointError: the lock file cannot be written.
    """
    with _opened(lock) as opened:
        order = sorted(range(pieces), key=lambda number: ((number - rank) % world, number))
        left, waits = [number for number in order if not done(number)], False
        while left:
            later = []
            for number in left:
                if not _lock(opened, number, waits):
                    later.append(number)
                    continue
                waits = False
                try:
                    if not done(number):  # another process may have done it meanwhile
                        yield number
                finally:
                    fcntl.lockf(opened, fcntl.LOCK_UN, 1, number)
            left, waits = later, True


@contextmanager
def alone(folder: Path, names: Collection[str] = ()) -> Iterator[None]:
    """Lets one process at a time run the block for a folder, and removes what killed ones left of files named `names`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with _opened(folder / ".lock") as opened:
        _lock(opened, 0, waits=True)
        remove_temporary(folder, names)
        yield


def _opened(lock: Path) -> IO[bytes]:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("ab")
    except OSError as problem:
        raise CheckpointError(disk_message(lock, problem)) from problem


def _lock(opened: IO[bytes], number: int, waits: bool) -> bool:
    """Locks a byte of a file; returns whether it is locked now, which it always is if `waits`."""
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, number)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if problem.errno not in NO_LOCKS:
            raise
        # Without locks two processes may do the same work, and write the same bytes.
    return True
