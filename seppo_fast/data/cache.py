"""Opens the latent cache of a data set, or has it built first.

A cache is a folder `latents-<key>` of safetensors shards and an `index.json`. Its key is a digest of everything that
changes what is in it, so a cache is never updated: other data, another resolution or another encoder make another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from seppo_fast.data.build import Encoder, build
from seppo_fast.data.examples import Source, require_kind
from seppo_fast.data.images import check_framing
from seppo_fast.data.latents import FORMAT_VERSION, INDEX, LatentCache
from seppo_fast.errors import DataError
from seppo_fast.files import staged_folder

__all__ = ["Encoder", "LatentCache", "cache_key", "open_or_build", "truncation"]

_ABANDONED_SECONDS = 3600
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
    batch_size: int = 8,
    losers: bool = True,
    report: Callable[[str], object] = print,
) -> LatentCache:
    """Opens the cache of `source` below `folder`; encodes it first where it is not there yet.

    Args:
        source: The data.
        encoder: Turns images and prompts into what is stored. Not called when the cache exists, but for its
            fingerprint.
        resolution: Side of the square images in pixels.
        frames: How many frames to take of each clip, as `clips.choose_frames` does; None where the source has images.
        flip: Mirror half of the clips, by their ids. Clips only.
        crop: See `images.load_image`.
        folder: Where caches are kept; made if missing.
        batch_size: Images encoded at once; of clips as many as have so many frames, but at least one. Not part of the
            key.
        losers: Whether the losers of labelled pairs are encoded too; a method that needs winners only can save half.
        report: Called with each line for the user: progress, every example left out, a warning where prompts are
            truncated or clips too short.

    Returns:
        The cache, whole: it is built in a folder beside its place and renamed once complete.

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
    key = cache_key(
        source.digest(),
        encoder.fingerprint(),
        resolution=resolution,
        crop=crop,
        losers=losers,
        frames=frames,
        flip=flip,
    )
    final = folder / f"latents-{key[:16]}"
    _remove_abandoned(folder)
    if not final.exists():
        try:
            with staged_folder(final, DataError) as staging:
                build(source, encoder, staging, key, resolution, batch_size, losers, frames, flip, report)
        except DataError:
            # another process may have finished this very cache meanwhile, and then the rename fails
            if not (final / INDEX).exists():
                raise
    cache = LatentCache(final, key)
    for line in truncation(cache.truncated, len(set(cache.prompts))):
        report(line)
    if cache.repeating:
        report(f"{len(cache.repeating)} of {len(cache)} clips have fewer than {frames} frames and repeat some")
    return cache


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
) -> str:
    """sha256 (hex) over everything that changes a cache's content; `frames` and `flip` where they are clips."""
    parts: dict[str, object] = {
        "format_version": FORMAT_VERSION,
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
