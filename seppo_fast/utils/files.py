"""Folders that appear whole or not at all, and JSON that cannot do harm."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from seppo_fast.utils.errors import SeppoError

# What disks that lack a call say: Lustre and NFS of locks; CIFS, FUSE and shared folders of flushing a folder.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})
_NO_FLUSH = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF})
_NO_ALLOCATION = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_ZEROS = 1 << 24  # bytes written at once


@contextmanager
def staged_folder(final: Path, error: type[SeppoError]) -> Iterator[Path]:
    """A folder to fill, renamed to `final` at the end of the block; on any failure nothing of it is left.

    Args:
        final: must not exist yet; its parent is made.
        error: what to raise where the disk refuses: no space, read-only, no permission.
    """
    staging = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        # A random part: containers that share a folder may share process ids too.
        staging = Path(tempfile.mkdtemp(f"-{os.getpid()}", f".tmp-{final.name}-", final.parent))
        with suppress(OSError):  # some disks have permissions of their own
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
    """Returns a path with a leading `~` or `~user` replaced; raises `error` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as problem:
        raise error(f"{path!r}: {problem}") from problem


def read_json(file: Path, most: int = 1 << 26) -> Any:
    """What a JSON file of at most so many bytes holds.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: it is larger, nested too deeply, or no JSON.
    """
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    if file.stat().st_size > most:
        raise ValueError(f"{file.stat().st_size} bytes, {most} at most")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def free_name(path: Path) -> Path:
    """`path`, or `path-2`, `path-3`, ...: the first that does not exist."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(place for place in itertools.chain([path], numbered) if not place.exists())


def disk_message(path: Path, problem: Exception) -> str:
    """What the disk said about `path`, and what to do."""
    # safetensors writes in Rust and says the error's number in words only.
    said = re.search(r"\(os error (\d+)\)", str(problem))
    number = int(said[1]) if said else getattr(problem, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: {problem}"
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return f"no space left for {path} ({free:.0f} MiB free); make room or choose another folder"


def allocate(handle: int, size: int) -> None:
    """Takes `size` bytes of disk for an empty file, so that writing to its mapped memory finds space later.

    Raises:
        OSError: no space.
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
            "this disk does not flush what is written on request: after a power failure the newest folder of a run or "
            f"a cache may be missing or incomplete ({problem.strerror})",
            RuntimeWarning,
            stacklevel=3,
        )
    finally:
        os.close(handle)
