"""Atomically written folders, bounded reading of JSON, and messages about disks."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seppo_fast.utils.errors import SeppoError

# Error codes of file systems that lack a call: locks on Lustre and NFS; fsync of a folder on CIFS, FUSE and shared
# folders.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})
_NO_FLUSH = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF})
_NO_ALLOCATION = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_ZEROS = 1 << 24  # bytes per write
_TEMPORARY = ".tmp-"


@contextmanager
def staged_folder(final: Path, error: type[SeppoError]) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `final` at the end of the block, or removed on any failure.

    Args:
        final: the resulting folder; it must not exist yet, its parent is created.
        error: the exception class to raise when writing fails: no space, read-only, no permission.
    """
    staging = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # The process id alone is not unique: containers that share a folder may share process ids too.
        staging = Path(tempfile.mkdtemp(f"-{os.getpid()}", f".tmp-{final.name}-", final.parent))
        with suppress(OSError):  # some file systems do not support chmod
            staging.chmod(0o755)
        yield staging
        for file in staging.rglob("*"):
            _fsync(file)
        _fsync(staging)
        os.replace(staging, final)
        _fsync(final.parent)
    except (OSError, SafetensorError) as problem:
        raise error(disk_message(final, problem)) from problem
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def home_expanded(path: str, error: type[SeppoError]) -> Path:
    """Returns `path` with a leading `~` or `~user` expanded; raises `error` if the home folder cannot be determined."""
    try:
        return Path(path).expanduser()
    except RuntimeError as problem:
        raise error(f"{path!r}: {problem}") from problem


def read_json(file: Path, most: int = 1 << 26) -> Any:
    """Returns the content of a JSON file of at most `most` bytes.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: the file is larger, nested too deeply, or not JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    if file.stat().st_size > most:
        raise ValueError(f"it has {file.stat().st_size} bytes, the limit is {most}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomically(file: Path, content: bytes, error: type[SeppoError]) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it, so that it is complete or absent.

    A killed process leaves a file named `.tmp-<name>-...` beside it; see `remove_temporary`.

    Args:
        file: the file to write or replace; its folder is created.
        content: the file's content.
        error: the exception class to raise when writing fails: no space, read-only, no permission.
    """
    staging = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Unique, because several processes may write the same file.
        staging = file.with_name(f"{_TEMPORARY}{file.name}-{secrets.token_hex(4)}")
        with staging.open("wb") as opened:
            opened.write(content)
        _fsync(staging)
        os.replace(staging, file)
        _fsync(file.parent)
    except OSError as problem:
        raise error(disk_message(file, problem)) from problem
    finally:
        if staging is not None:
            staging.unlink(missing_ok=True)


def remove_temporary(folder: Path, names: Collection[str]) -> None:
    """Removes what killed processes left in a folder when they wrote these files; no other process may write them."""
    for left in folder.glob(f"{_TEMPORARY}*"):
        if left.name.removeprefix(_TEMPORARY).rpartition("-")[0] in names:
            left.unlink(missing_ok=True)


def blocking_file(folder: Path) -> Path | None:
    """Returns the file because of which a folder cannot be created: at its own path or a parent's; None without one.

    Raises:
        OSError: a parent cannot be searched.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return None if existing.is_dir() else existing


def link_or_copy(source: Path, target: Path) -> None:
    """Creates a hard link to a file, or a copy if the file system does not support links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def free_name(path: Path) -> Path:
    """Returns the first of `path`, `path-2`, `path-3`, ... that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not place.exists())


def disk_message(path: Path, problem: Exception) -> str:
    """Returns a message that `path` cannot be written, and what to do if the disk is full."""
    # safetensors writes in Rust and gives the error number only as text.
    said = re.search(r"\(os error (\d+)\)", str(problem))
    number = int(said[1]) if said else getattr(problem, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: {problem}"
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return f"no space left for {path} ({free:.0f} MiB free); make room or choose another folder"


def allocate(handle: int, size: int) -> None:
    """Allocates `size` bytes on disk for an empty file, so that writes to its memory map cannot run out of space.

    Raises:
        OSError: no space is left, or the file cannot be written.
    """
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as problem:
        if problem.errno not in _NO_ALLOCATION:
            raise
        for start in range(0, size, _ZEROS):
            os.pwrite(handle, bytes(min(_ZEROS, size - start)), start)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as problem:
        if problem.errno not in _NO_FLUSH:
            raise
        warnings.warn(
            "this file system does not support fsync: after a power failure the newest folder of a run or a cache "
            f"may be missing or incomplete ({problem.strerror})",
            RuntimeWarning,
            stacklevel=3,
        )
    finally:
        os.close(handle)
