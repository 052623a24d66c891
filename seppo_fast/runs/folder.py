"""A run's folder: one process writes it at a time, and the same command goes on with what is in it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seppo_fast.data.names import holds_no_data
from seppo_fast.distributed.machine import Node
from seppo_fast.runs.checkpoint import SavedState, newest_state, saved_states
from seppo_fast.runs.journal import LOG, SKIPPED
from seppo_fast.runs.trackers import FOLDERS
from seppo_fast.utils.errors import CheckpointError, ConfigError, SeppoError
from seppo_fast.utils.files import NO_LOCKS, disk_message
from seppo_fast.utils.logging import say

LOCK = ".lock"
_MARK = "a run of seppo_fast\n"
# What a run writes before its first state.
_BEGUN = {"config.yaml", LOG, SKIPPED, "samples", "state", "report.html"} | FOLDERS


def is_begun(folder: Path) -> bool:
    """Returns whether a folder is a run's, which may not have finished its first update yet."""
    if (folder / "config.yaml").is_file():
        return True
    try:
        return (folder / LOCK).is_file() and (folder / LOCK).read_text(encoding="utf-8") == _MARK
    except (OSError, UnicodeDecodeError):
        return False


def refuse_occupied(folder: Path) -> None:
    """Passes a folder that is absent, empty or a run's.

    Raises:
        ConfigError: it holds something else, or lies below a file.
        CheckpointError: it cannot be written, or what it holds cannot be listed.
    """
    try:
        if folder.exists() and not (folder.is_dir() and (_ours(folder) or not _names(folder))):
            raise ConfigError(
                f"output = {str(folder)!r} is not empty and holds no run that can go on; choose another folder or "
                "remove it"
            )
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not existing.is_dir():
            raise ConfigError(f"output = {str(folder)!r}: {existing} is a file; choose another folder")
        for place in (existing, folder / "state"):
            if place.exists() and not os.access(place, os.W_OK):
                raise CheckpointError(f"output = {str(folder)!r}: {place} cannot be written")
    except OSError as problem:
        raise CheckpointError(disk_message(folder, problem)) from problem


def _ours(folder: Path) -> bool:
    """Whether a run can go on there, or begin where one ended before its first state.

    Raises:
        ConfigError: something else lies where the states do: states under other names, perhaps.
        CheckpointError: the states cannot be listed.
    """
    if saved_states(folder):
        return True
    others = _names(folder / "state") if (folder / "state").is_dir() else set()
    if others:
        raise ConfigError(
            f"output = {str(folder)!r}: state/ holds no saved state, but {', '.join(sorted(others)[:3])}. To resume, "
            "rename a whole state to update- and its number of updates; to start another run, choose another folder"
        )
    try:
        mark = (folder / LOCK).read_text(encoding="utf-8")
        # Without the mark it was killed before it wrote one.
        return _names(folder) <= _BEGUN if mark == _MARK else not mark and not _names(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _names(folder: Path) -> set[str]:
    """What lies there, but for hidden files (the lock, unfinished ones) and those that systems keep for themselves."""
    return {path.name for path in folder.iterdir() if not holds_no_data(path.name)}


@contextmanager
def claimed(folder: Path, machine: Node) -> Iterator[SavedState | None]:
    """Holds a run's folder, so that no other run writes it meanwhile; gives the state that it was left in.

    A lock of a process that is gone is no lock. A folder in which nothing was written in the end is removed again.

    Args:
        folder: of the run.
        machine: the processes of the run; the one of rank 0 holds the lock, all read the same state.

    Raises:
        ConfigError: another run holds it; as `refuse_occupied`.
        CheckpointError: it cannot be written; it holds saved states and none can be used.
    """
    handle, found = None, None
    failed: SeppoError | None = None
    try:
        if machine.rank == 0:
            try:
                refuse_occupied(folder)
                handle = _locked(folder)
                _remove_unfinished(folder)
                found = newest_state(folder)
                if found is None and (folder / "log.jsonl").exists():
                    say(f"{folder}: no state was saved before the run ended; it begins anew")
            except (ConfigError, CheckpointError) as problem:
                failed = problem
            except OSError as problem:
                failed = CheckpointError(disk_message(folder, problem))
        failed, found = machine.from_first((failed, found))
        if failed is not None:
            raise failed
        yield found
    finally:
        if handle is not None:
            _release(folder, handle)


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as problem:
        raise CheckpointError(disk_message(folder, problem)) from problem
    try:
        # Of this descriptor, so that a process that ends in any way lets go of it. Not lockf: its locks are of the
        # process, which would lose them as soon as it read the file and closed it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            os.close(handle)
            raise ConfigError(f"output = {str(folder)!r}: another run is writing there") from None
        if problem.errno not in NO_LOCKS:
            os.close(handle)
            raise CheckpointError(f"{folder / LOCK}: cannot be locked: {problem}") from problem
        say(f"{folder}: files cannot be locked there ({problem.strerror}); start no second run on this folder")
    try:
        os.pwrite(handle, _MARK.encode(), 0)
    except OSError as problem:
        _release(folder, handle)
        raise CheckpointError(disk_message(folder, problem)) from problem
    return handle


def _remove_unfinished(folder: Path) -> None:
    """What a killed process was writing; nobody writes now."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _release(folder: Path, handle: int) -> None:
    """Gives the folder back, and removes one in which nothing was written."""
    try:
        if {path.name for path in folder.iterdir()} == {LOCK}:
            (folder / LOCK).unlink()
            folder.rmdir()
    except OSError:
        pass  # gone, or no longer ours to clean up
    finally:
        os.close(handle)
