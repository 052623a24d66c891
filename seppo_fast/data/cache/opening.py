"""Opens the latent cache of a data set, or has it built first.

A cache is a folder `latents-<format>-<key>` of safetensors shards and an `index.json`. Its key is a digest of
everything that changes what is in it, so a cache is never updated: other data, another resolution or another encoder
make another one.
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
from seppo_fast.data.examples import Source, require_kind
from seppo_fast.data.media.images import check_framing
from seppo_fast.data.remarks import remark_lines
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.files import NO_LOCKS, disk_message, staged_folder
from seppo_fast.utils.logging import say

__all__ = ["Encoder", "LatentCache", "cache_key", "open_or_build", "truncation"]

_ABANDONED_SECONDS = 3600
_IN_KEYS = 2  # the format that was part of every key, while one was
_SHOWN = 80  # characters of a prompt


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
    """Opens the cache of `source` below `folder`; encodes it first where it is not there yet.

    Args:
        source: The data.
        encoder: Turns images and prompts into what is stored. Not called when the cache exists, but for its
            fingerprint.
        resolution: Side of the square images in pixels.
        frames: How many frames to take of each clip, as `frames.choose_frames` does; None where the source has images.
        flip: Mirror half of the clips, by their ids. Clips only.
        crop: See `images.load_image`.
        folder: Where caches are kept; made if missing.
        batch_size: Images encoded at once; of clips as many as have so many frames, but at least one. Not part of the
            key.
        losers: Whether the losers of labelled pairs are encoded too; a method that needs winners only can save half.
        accept: Called with the cache's `fingerprint` and `former` before anything is encoded; may raise.

    Returns:
        The cache, whole: it is built in a folder beside its place and renamed once complete, by one process, while
        others that want the same one wait; where that one is killed, another of them builds it.

    Raises:
        DataError: no data; more than 1 % of them bad; no space left or `folder` not writable; a cache that is damaged;
            clips without `frames`, or images with; PyAV needed and not installed.
        NonFiniteError: the encoder gave infinities or NaN.
        ValueError: resolution, frames, flip, crop or batch_size is not allowed.
    """
    check_framing(resolution, crop)
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if frames is not None and frames < 1:
        raise ValueError(f"frames must be positive, got {frames}")
    if flip and frames is None:
        raise ValueError("flip mirrors clips, and frames is None: these are images")
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
            if not final.exists():  # it may have been finished while we waited
                _build(source, encoder, final, key, resolution, batch_size, losers, frames, flip)
    cache = LatentCache(final, key, former, encoder.collate)
    for line in truncation(cache.truncated, len(set(cache.prompts))):
        say(line)
    for line in remark_lines(cache.remarks, len(cache) * (1 + losers), resolution, frames):
        say(line)
    return cache


def _build(source: Source, encoder: Encoder, final: Path, *settings: Any) -> None:
    """`build` into a folder that appears whole or not at all."""
    try:
        with staged_folder(final, DataError) as staging:
            build(source, encoder, staging, *settings)
    except DataError:
        # without locks another process may have finished this very cache meanwhile, and then the rename fails
        if not (final / INDEX).exists():
            raise


@contextmanager
def _alone(final: Path) -> Iterator[None]:
    """Holds the building of a cache, after waiting for another process that has it; one that is killed lets go.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(final)
    except OSError as problem:
        raise DataError(disk_message(final, problem)) from problem
    try:
        if handle is not None:
            for left in final.parent.glob(f".tmp-{final.name}-*"):
                shutil.rmtree(left, ignore_errors=True)  # who wrote it was killed: it would hold the lock
        yield
    finally:
        if handle is not None:
            _lock_file(final).unlink(missing_ok=True)
            os.close(handle)


def _lock_file(final: Path) -> Path:
    return final.with_name(f".lock-{final.name}")


def _locked(final: Path) -> int | None:
    """The open and locked lock file; None where the file system has no locks, so that two may build the same."""
    waiting = False
    while True:
        handle = os.open(_lock_file(final), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if waiting else fcntl.LOCK_NB))
            # Who had it before us removes the file; then ours is a file without a name, which locks nobody out.
            if os.path.samestat(os.fstat(handle), _lock_file(final).stat()):
                return handle
            os.close(handle)
        except OSError as problem:
            os.close(handle)
            if problem.errno in (errno.EAGAIN, errno.EACCES):
                say(f"another process is filling this cache, {final}; waiting for it")
                waiting = True
            elif problem.errno in NO_LOCKS:
                say(f"{final.parent}: files cannot be locked there ({problem.strerror}); two runs may encode the same")
                return None
            elif problem.errno != errno.ENOENT:
                raise
        except BaseException:
            os.close(handle)
            raise


def truncation(too_long: Sequence[str], prompts: int) -> list[str]:
    """The line that says how many of the prompts are truncated; none where none is."""
    if not too_long:
        return []
    first = too_long[0] if len(too_long[0]) <= _SHOWN else f"{too_long[0][:_SHOWN]} ..."
    return [
        f"{len(too_long)} of {prompts} prompts have more tokens than the text encoder takes; it sees their beginning "
        f"only. The first: {first!r}"
    ]


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
    """sha256 (hex) over everything that changes a cache's content; `frames` and `flip` where they are clips.

    The format is no part of it; with `format_version` it is the key that the same content had while it was.
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
    """Clears what a killed build left: its process is gone and nothing was written for an hour.

    The hour is for folders shared by machines, where a build's process is alive but not here.
    """
    for staging in folder.glob(".tmp-latents-*"):
        owner = staging.name.rpartition("-")[2]
        try:
            newest = max(path.stat().st_mtime for path in (staging, *staging.iterdir()))
            if owner.isdigit() and not _alive(int(owner)) and time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(staging, ignore_errors=True)
        except FileNotFoundError:  # its owner finished or cleared it while we looked
            continue


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
