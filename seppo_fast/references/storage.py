"""Past policies as files: one safetensors file per checkpoint, and a manifest that lists them with their checksums.

A file holds one tensor of bytes, the slab, and the slab's layout as JSON in the header. Files are memory-mapped, never
read as a whole, so a pool on disk takes no memory except the system's page cache. Nothing here unpickles.
"""

from __future__ import annotations

import json
import os
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
from seppo_fast.utils.files import link_or_copy, read_json, staged_folder
from seppo_fast.utils.manifest import MANIFEST, FileRow

FORMAT = 1
_SLAB, _TABLE = "slab", "table"

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A stored checkpoint: its slab, and the tier that holds it.

    Attributes:
        tier: the tier that holds the slab.
        slab: `(size,)` uint8; on disk a memory-mapped file, which must not be written to.
    """

    tier: Tier
    slab: Tensor


def write_checkpoint(file: Path, slab: Tensor, layout: PackedLayout) -> None:
    """Writes a slab, which must be on the CPU, and its layout; the file appears complete or not at all.

    Raises:
        OSError, SafetensorError: the disk refuses the write.
    """
    staging = file.with_name(f".tmp-{file.name}")
    try:
        save_file({_SLAB: slab}, staging, metadata={_TABLE: json.dumps(layout.to_json())})
        os.replace(staging, file)
    finally:
        staging.unlink(missing_ok=True)


def map_checkpoint(file: Path) -> tuple[Tensor, PackedLayout]:
    """Returns the slab of a file, memory-mapped and not to be written to, and its layout.

    Raises:
        CheckpointError: the file is missing or is not a checkpoint of a pool; the message names it.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slab = opened.get_tensor(_SLAB)
            layout = PackedLayout.from_json(json.loads((opened.metadata() or {})[_TABLE]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as problem:
        raise CheckpointError(f"{file}: not a valid checkpoint of a reference pool ({problem})") from problem
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
    """Writes all checkpoints and their manifest into a folder that appears complete or not at all.

    Args:
        folder: the new folder; must not exist yet.
        checkpoints: the stored checkpoints by number.
        layout: the layout of all of them.
        count: number of checkpoints added so far, including dropped ones.
        settings: settings that a pool must share to restore these checkpoints.
        previous: a folder to which the same pool was saved before; undamaged checkpoints in it are linked, not written
            again.

    Raises:
        CheckpointError: the folder exists, the disk refuses the write, or `previous` is not a saved pool with these
            settings.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: already exists")
    before = {} if previous is None else _manifest(previous, settings)[0]
    with staged_folder(folder, CheckpointError) as staging:
        rows = []
        for number, stored in checkpoints.items():
            file = staging / checkpoint_name(number)
            if previous is not None and number in before and not before[number].damage(previous, file.name):
                link_or_copy(previous / file.name, file)
                row = before[number]
            else:
                write_checkpoint(file, stored.slab.cpu(), layout)
                row = FileRow.of(file)
            rows.append({"number": number, "file": file.name, **row.to_json()})
        tree = {"format": FORMAT, "count": count, "settings": dict(settings), "members": rows}
        (staging / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def checked_checkpoints(folder: Path, settings: Settings | None = None) -> tuple[dict[int, Path], int]:
    """Returns a saved pool's files by number, after checking sizes and checksums, and the count of checkpoints so far.

    Args:
        folder: a folder that `save_checkpoints` wrote.
        settings: settings that the saved pool must have; None accepts any.

    Raises:
        CheckpointError: the manifest cannot be read, or has a newer format or other settings; or files are missing or
            damaged, and the message names all of them.
    """
    rows, count = _manifest(folder, settings)
    files = {number: folder / checkpoint_name(number) for number in sorted(rows)}
    found = {file.name: rows[number].damage(folder, file.name) for number, file in files.items()}
    damaged = [f"{name} {what}" for name, what in found.items() if what]
    if damaged:
        raise CheckpointError(
            f"{folder}: {len(damaged)} of {len(rows)} checkpoints cannot be used: " + "; ".join(damaged)
        )
    return files, count


def is_saved_pool(folder: Path) -> bool:
    """Returns whether a folder holds a readable manifest of a pool; its checkpoints are not checked."""
    try:
        _manifest(folder, None)
    except CheckpointError:
        return False
    return True


def _manifest(folder: Path, settings: Settings | None) -> tuple[dict[int, FileRow], int]:
    """Returns the manifest's row for each checkpoint, by number, and the count of checkpoints so far."""
    manifest = folder / MANIFEST
    try:
        tree: dict[str, Any] = read_json(manifest)
        if int(tree["format"]) > FORMAT:
            raise CheckpointError(f"{manifest}: format {tree['format']} is newer than this version of seppo_fast reads")
        rows = {int(row["number"]): FileRow.read(row) for row in tree["members"]}
        count, saved = int(tree["count"]), dict(tree["settings"])
        # Checkpoint 0 always stays.
        if min(rows, default=None) != 0 or max(rows) >= count:
            raise ValueError(f"it lists checkpoints {sorted(rows)} of {count}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as problem:
        raise CheckpointError(f"{manifest}: not a valid manifest of a reference pool ({problem})") from problem
    others = [
        f"{key} = {saved.get(key)!r}, not {value!r}"
        for key, value in (settings or {}).items()
        if saved.get(key) != value
    ]
    if others:
        raise CheckpointError(f"{folder}: saved by a pool with other settings: {', '.join(others)}")
    return rows, count


def checkpoint_name(index: int) -> str:
    """Returns the file name of a checkpoint."""
    return f"checkpoint-{index:06d}.safetensors"
