"""Opens the latent cache of a data set, building it first if necessary.

A cache is a folder `latents-<format>-<key>` of safetensors shards and an `index.json`. Its key is a digest of
everything that determines its content, so a cache is never updated: other data, another resolution or another encoder
lead to a separate cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seppo_fast.data.cache.build import BATCH, Encoder, build
from seppo_fast.data.cache.latents import FORMAT_VERSION, INDEX, LatentCache
from seppo_fast.data.examples import Source, counted, require_kind
from seppo_fast.data.media.images import check_framing
from seppo_fast.data.remarks import remark_lines
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.files import NO_LOCKS, disk_message, staged_folder
from seppo_fast.utils.logging import say

__all__ = ["Encoder", "LatentCache", "cache_key", "open_or_build", "truncation"]

_ABANDONED_SECONDS = 3600
_IN_KEYS = 2  # the last format version that was part of every key; later formats are not
_SHOWN = 80  # characters of a prompt shown in a message


def open_or_build(
    source: Source,
    encoder: Encoder,
    *,
    resolution: int,
    frames: int | None = None,
    flip: bool = False,
    crop: str = "center",
    folder: Path,
    batch_size: int = BATCH,
    losers: bool = True,
    accept: Callable[[str, str], object] = lambda fingerprint, former: None,
) -> LatentCache:
    """Opens the cache of `source` below `folder`, encoding the data first if the cache does not exist.

    Args:
        source: The data set.
        encoder: Encodes images and prompts. If the cache exists, only its fingerprint and `collate` are used.
        resolution: Side of the square images in pixels.
        frames: The number of frames taken from each clip, see `media.frames`; None if the source holds images.
        flip: Whether to mirror half of the clips, selected by their ids. Clips only.
        crop: See `images.load_image`.
        folder: The folder that holds all caches; created if missing.
        batch_size: The number of images encoded at once. For clips, the number of frames encoded at once, but at least
            one clip. Not part of the key.
        losers: Whether the losers of labelled pairs are encoded too; a method that needs winners only can save half.
        accept: Called with the cache's `fingerprint` and `former` before anything is encoded; may raise.

    Returns:
        The complete cache. One process builds it in a temporary folder that is renamed once complete; other processes
        that need the same cache wait, and one of them takes over if the builder is killed.

    Raises:
        DataError: the data set is empty, or more than 1 % of its examples are bad; no space is left or `folder` is not
            writable; the cache is damaged; clips without `frames`, or images with `frames`; PyAV is needed but not
            installed.
        NonFiniteError: the encoder returned infinities or NaN.
        ValueError: resolution, frames, flip, crop or batch_size is invalid.
    """
    check_framing(resolution, crop)
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be positive, got {frames}")
    if flip and frames is None:
        raise ValueError("flip applies to clips only, but frames is None: the data are images")
    require_kind(source, frames)
    losers = losers and source.has_losers
    settings: dict[str, Any] = {
        "resolution": resolution,
        "crop": crop,
        "losers": losers,
        "frames": frames,
        "flip": flip,
    }
    content = source.digest(), encoder.fingerprint()
    key, former = cache_key(*content, **settings), cache_key(*content, **settings, format_version=_IN_KEYS)
    accept(key, former)
    final = folder / f"latents-{FORMAT_VERSION}-{key[:16]}"
    _remove_abandoned(folder)
    if not final.exists():
        with _alone(final):
            if not final.exists():  # another process may have finished it while this one waited
                _build(source, encoder, final, key, resolution, batch_size, losers, frames, flip)
    cache = LatentCache(final, key, former, encoder.collate)
    for line in truncation(cache.truncated, len(set(cache.prompts))):
        say(line)
    for line in remark_lines(cache.remarks, len(cache) * (1 + losers), resolution, frames):
        say(line)
    return cache


def _build(source: Source, encoder: Encoder, final: Path, *settings: Any) -> None:
    """Runs `build` in a temporary folder that is renamed to `final` only once it is complete."""
    try:
        with staged_folder(final, DataError) as staging:
            build(source, encoder, staging, *settings)
    except DataError:
        # Without locks another process may have finished the same cache meanwhile, so that the rename fails.
        if not (final / INDEX).exists():
            raise


@contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Holds the lock on building a cache, waiting for another process that holds it; a killed process releases it.

    Raises:
        DataError: the folder is not writable.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(final)
    except OSError as problem:
        raise DataError(disk_message(final, problem)) from problem
    try:
        if handle is not None:
            for left in final.parent.glob(f".tmp-{final.name}-*"):
                shutil.rmtree(left, ignore_errors=True)  # its writer was killed, or it would still hold the lock
        yield
    finally:
        if handle is not None:
            _lock_file(final).unlink(missing_ok=True)
            os.close(handle)


def _lock_file(final: Path) -> Path:
    return final.with_name(f".lock-{final.name}")


def _locked(final: Path) -> int | None:
    """Returns a handle of the locked lock file, or None if the file system has no locks: two may build the same."""
    waiting = False
    while True:
        handle = os.open(_lock_file(final), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
            # The previous holder removes the file. Ours is then an unlinked file, which locks nobody out: try again.
            if os.path.samestat(os.fstat(handle), _lock_file(final).stat()):
                return handle
            os.close(handle)
        except OSError as problem:
            os.close(handle)
            if problem.errno in (errno.EAGAIN, errno.EACCES):
                say(f"another process is filling this cache, {final}; waiting for it")
                waiting = True
            elif problem.errno in NO_LOCKS:
                say(
                    f"{final.parent}: files cannot be locked there ({problem.strerror}); two runs may encode the same "
                    "data"
                )
                return None
            elif problem.errno != errno.ENOENT:
                raise
        except BaseException:
            os.close(handle)
            raise


def truncation(too_long: Sequence[str], prompts: int) -> list[str]:
    """Returns a line that says how many of the prompts are truncated, or an empty list if none are."""
    if not too_long:
        return []
    first = too_long[0] if len(too_long[0]) <= _SHOWN else f"{too_long[0][:_SHOWN]} ..."
    have, are = ("has", "is") if len(too_long) == 1 else ("have", "are")
    count = f"{len(too_long)} of {counted(prompts, 'prompt', 'prompts')}"
    return [f"{count} {have} more tokens than the text encoder accepts and {are} truncated. The first: {first!r}"]


def cache_key(
    source_digest: str,
    fingerprint: dict[str, str],
    *,
    resolution: int,
    crop: str,
    losers: bool,
    frames: int | None = None,
    flip: bool = False,
    format_version: int | None = None,
) -> str:
    """Returns the sha256 (hex) over everything that changes a cache's content; for clips, also `frames` and `flip`.

    The key does not depend on the cache's format. With `format_version` the result is the key that the same content
    had when the format was still part of it.
    """
    parts: dict[str, object] = {} if format_version is None else {"format_version": format_version}
    parts |= {
        "source": source_digest,
        "encoder": fingerprint,
        "resolution": resolution,
        "crop": crop,
        "losers": losers,
    }
    if frames is not None:
        parts |= {"frames": frames, "flip": flip}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed builds left: their process no longer exists and nothing was written for an hour.

    The hour protects folders shared between machines, where the process of a running build is on another machine.
    """
    for staging in folder.glob(".tmp-latents-*"):
        owner = staging.name.rpartition("-")[2]
        try:
            newest = max(path.stat().st_mtime for path in (staging, *staging.iterdir()))
            if owner.isdigit() and not _alive(int(owner)) and time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(staging, ignore_errors=True)
        except FileNotFoundError:  # its owner finished or removed it meanwhile
            continue


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
