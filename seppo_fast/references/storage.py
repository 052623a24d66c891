"""Past policies as files: one safetensors file each, and a manifest that says which there are and their checksums.

A file holds one tensor of bytes, the slab, and its layout as JSON in the header; it is mapped, never read whole, so a
pool on disk takes no memory but what the system caches. Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seppo_fast.references.layout import PackedLayout
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import read_json, staged_folder
from seppo_fast.utils.manifest import MANIFEST, FileRow

FORMAT = 1
_SLAB, _TABLE = "slab", "table"

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint.

    Attributes:
        tier: where it is.
        slab: `(size,)` uint8; on disk, mapped, to be read only.
    """

    tier: Tier
    slab: Tensor


def write_checkpoint(file: Path, slab: Tensor, layout: PackedLayout) -> None:
    """Writes a slab, which is on the CPU, and its layout; the file appears whole or not at all.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    staging = file.with_name(f".tmp-{file.name}")
    try:
        save_file({_SLAB: slab}, staging, metadata={_TABLE: json.dumps(layout.to_json())})
        os.replace(staging, file)
    finally:
        staging.unlink(missing_ok=True)


def map_checkpoint(file: Path) -> tuple[Tensor, PackedLayout]:
    """The slab of a file, mapped and to be read only, and its layout.

    Raises:
        CheckpointError: no such file, or what it holds is no checkpoint of a pool; names it.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slab = opened.get_tensor(_SLAB)
            layout = PackedLayout.from_json(json.loads((opened.metadata() or {})[_TABLE]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{file}: no checkpoint of a reference pool ({problem})") from problem
    if slab.dtype != torch.uint8 or slab.shape != (layout.size,):
        raise CheckpointError(f"{file}: holds {tuple(slab.shape)} {slab.dtype}, not a slab of {layout.size} bytes")
    return slab, layout


Settings = Mapping[str, str | int | None]


def save_checkpoints(
    folder: Path,
    checkpoints: Mapping[int, StoredCheckpoint],
    layout: PackedLayout,
    count: int,
    settings: Settings,
    previous: Path | None = None,
) -> None:
    """Writes all checkpoints and their manifest into a folder that appears whole or not at all.

    Args:
        folder: must not exist yet.
        checkpoints: by number.
        layout: of them all.
        count: of the checkpoints so far, with those that were dropped.
        settings: in which a pool that takes them over must agree.
        previous: a folder that was saved before of the same pool; what it holds undamaged is linked, not written again.

    Raises:
        CheckpointError: the disk refuses, or `previous` is no saved pool of these settings.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: is there already")
    before = {} if previous is None else _manifest(previous, settings)[0]
    with staged_folder(folder, CheckpointError) as staging:
        rows = []
        for number, stored in checkpoints.items():
            file = staging / checkpoint_name(number)
            if previous is not None and number in before and not before[number].damage(previous, file.name):
                _link(previous / file.name, file)
                row = before[number]
            else:
                write_checkpoint(file, stored.slab.cpu(), layout)
                row = FileRow.of(file)
            rows.append({"number": number, "file": file.name, **row.to_json()})
        tree = {"format": FORMAT, "count": count, "settings": dict(settings), "members": rows}
        (staging / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def checked_checkpoints(folder: Path, settings: Settings | None = None) -> tuple[dict[int, Path], int]:
    """The files of a saved pool by number, each compared with its size and checksum, and the count of checkpoints.

    Args:
        folder: that `save_checkpoints` wrote.
        settings: in which the pool that was saved must agree; None: whatever they are.

    Raises:
        CheckpointError: a manifest that cannot be read, is of a newer format or of other settings; files that are
            missing or damaged, all of them named.
    """
    rows, count = _manifest(folder, settings)
    files = {number: folder / checkpoint_name(number) for number in sorted(rows)}
    found = {file.name: rows[number].damage(folder, file.name) for number, file in files.items()}
    damaged = [f"{name} {what}" for name, what in found.items() if what]
    if damaged:
        raise CheckpointError(
            f"{folder}: of {len(rows)} checkpoints {len(damaged)} cannot be used: " + "; ".join(damaged)
        )
    return files, count


def is_saved_pool(folder: Path) -> bool:
    """Whether a manifest is there that can be read; its checkpoints are not looked at."""
    try:
        _manifest(folder, None)
    except CheckpointError:
        return False
    return True


def _manifest(folder: Path, settings: Settings | None) -> tuple[dict[int, FileRow], int]:
    """The row of each checkpoint by number, and the count of checkpoints so far."""
    manifest = folder / MANIFEST
    try:
        tree: dict[str, Any] = read_json(manifest)
        if int(tree["format"]) > FORMAT:
            raise CheckpointError(f"{manifest}: format {tree['format']} is newer than this version of seppo_fast reads")
        rows = {int(row["number"]): FileRow.read(row) for row in tree["members"]}
        count, saved = int(tree["count"]), dict(tree["settings"])
        # Checkpoint 0 always stays.
        if min(rows, default=None) != 0 or max(rows) >= count:
            raise ValueError(f"checkpoints {sorted(rows)} of {count}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as problem:
        raise CheckpointError(f"{manifest}: no manifest of a reference pool ({problem})") from problem
    others = [
        f"{key} = {saved.get(key)!r}, not {value!r}"
        for key, value in (settings or {}).items()
        if saved.get(key) != value
    ]
    if others:
        raise CheckpointError(f"{folder}: saved by a pool with {', '.join(others)}")
    return rows, count


def checkpoint_name(index: int) -> str:
    """The file of a checkpoint."""
    return f"checkpoint-{index:06d}.safetensors"


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
