"""The lock on a run's folder: only one run writes to it at a time, and rerunning the command resumes what is in it."""

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
from seppo_fast.utils.files import NO_LOCKS, blocking_file, disk_message
from seppo_fast.utils.logging import say

LOCK = ".lock"
_MARK = "a run of seppo_fast\n"
CURVE = "curve.json"  # the judge's scores during a demo
# What a run may have written before its first state.
_BEGUN = {"config.yaml", LOG, SKIPPED, "samples", "state", "report.html", CURVE} | FOLDERS


def is_begun(folder: Path) -> bool:
    """Returns whether a folder is a run's, which may not have finished its first update yet."""
    if (folder / "config.yaml").is_file():
        return True
    try:
        return (folder / LOCK).is_file() and (folder / LOCK).read_text(encoding="utf-8") == _MARK
    except (OSError, UnicodeDecodeError):
        return False


def lacking(folder: Path, what: str, not_yet: str) -> str:
    """Returns a message that a path is not the folder of a run that has what a command needs.

    Args:
        folder: the path.
        what: continues "not the folder of a run", such as " with a saved state".
        not_yet: a sentence for a run that has begun but does not have it yet, with what to do.
    """
    if not os.path.exists(folder):
        return f"{folder}: does not exist; name the folder of a run, such as runs/demo"
    if not os.path.isdir(folder):
        return f"{folder}: is a file; name the folder of a run, such as runs/demo"
    return f"{folder}: {not_yet}" if is_begun(folder) else f"{folder}: not the folder of a run{what}"


def refuse_occupied(folder: Path) -> None:
    """Checks that a folder is missing, empty or a run's.

    Raises:
        ConfigError: it holds something else, or one of its parents is a file.
        CheckpointError: it is not writable, or its contents cannot be listed.
    """
    try:
        if blocking := blocking_file(folder):
            where = "" if blocking == folder else f": {blocking}"
            raise ConfigError(f"output = {str(folder)!r}{where} is a file; choose another folder")
        if folder.exists() and not (_ours(folder) or not _names(folder)):
            raise ConfigError(
                f"output = {str(folder)!r} is not empty and holds no run that can be resumed; choose another folder or "
                "remove it"
            )
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        for place in (existing, folder / "state"):
            if place.exists() and not os.access(place, os.W_OK):
                raise CheckpointError(f"output = {str(folder)!r}: {place} is not writable")
    except OSError as problem:
        raise CheckpointError(disk_message(folder, problem)) from problem


def _ours(folder: Path) -> bool:
    """Returns whether the folder holds a run to resume, or one that ended before its first state and can start over.

    Raises:
        ConfigError: state/ holds something other than states; perhaps they were renamed.
        CheckpointError: the states cannot be listed.
    """
    if saved_states(folder):
        return True
    others = _names(folder / "state") if (folder / "state").is_dir() else set()
    if others:
        raise ConfigError(
            f"output = {str(folder)!r}: state/ holds no saved state, but {', '.join(sorted(others)[:3])}. To resume, "
            "rename an intact state to update-NNNNNN, its number of finished updates; to start another run, choose "
            "another folder"
        )
    try:
        mark = (folder / LOCK).read_text(encoding="utf-8")
        # An empty lock file: the process was killed before it wrote the mark.
        return _names(folder) <= _BEGUN if mark == _MARK else not mark and not _names(folder)
    except (OSError, UnicodeDecodeError):
        return False


def _names(folder: Path) -> set[str]:
    """Returns the names in a folder, without hidden files (the lock, unfinished files) and operating-system files."""
    return {path.name for path in folder.iterdir() if not holds_no_data(path.name)}


@contextmanager
def lock_run_folder(folder: Path, machine: Node) -> Iterator[SavedState | None]:
    """Locks a run's folder against other runs inside the block, and yields its newest intact state, or None.

    The lock ends with the process that holds it. A folder in which nothing was written is removed at the end.

    Args:
        folder: the run's folder.
        machine: the run's processes; rank 0 holds the lock, and all get the same state.

    Raises:
        ConfigError: another run holds the lock, or see `refuse_occupied`.
        CheckpointError: the folder is not writable, or it holds saved states and none of them can be used.
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
        failed, found = machine.first((failed, found))
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
        # flock binds the lock to this descriptor, so it is released however the process ends. Not lockf: its locks
        # belong to the process and are lost as soon as it opens the file again and closes it.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            os.close(handle)
            raise ConfigError(
                f"output = {str(folder)!r}: another run is writing to this folder; choose another one"
            ) from None
        if problem.errno not in NO_LOCKS:
            os.close(handle)
            raise CheckpointError(f"{folder / LOCK}: cannot be locked: {problem}") from problem
        say(f"{folder}: this disk does not support file locks ({problem.strerror}); start no second run in this folder")
    try:
        os.pwrite(handle, _MARK.encode(), 0)
    except OSError as problem:
        _release(folder, handle)
        raise CheckpointError(disk_message(folder, problem)) from problem
    return handle


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left half written; safe because this process holds the lock."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _release(folder: Path, handle: int) -> None:
    """Releases the lock, and removes the folder if nothing was written in it."""
    try:
        if {path.name for path in folder.iterdir()} == {LOCK}:
            (folder / LOCK).unlink()
            folder.rmdir()
    except OSError:
        pass  # the folder was removed, or is no longer ours to clean up
    finally:
        os.close(handle)
