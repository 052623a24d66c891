"""Past policies as files: one safetensors file each, and a manifest that says which there are and their checksums.

A file holds one tensor of bytes, the slab, and its table as JSON in the header; it is mapped, never read whole, so a
pool on disk takes no memory but what the system caches. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seppo_fast.errors import CheckpointError
from seppo_fast.files import staged_folder
from seppo_fast.slab import Table

FORMAT = 1
MANIFEST = "manifest.json"
_SLAB, _TABLE = "slab", "table"

Tier = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class Member:
    """A checkpoint.

    Attributes:
        tier: where it is.
        slab: `(size,)` uint8; on disk, mapped, to be read only.
        file: on disk, its file.
    """

    tier: Tier
    slab: Tensor
    file: Path | None = None


def write_member(file: Path, slab: Tensor, table: Table) -> None:
    """Writes a slab, which is on the CPU, and its table; the file appears whole or not at all.

    Raises:
        OSError, SafetensorError: the disk refuses.
    """
    staging = file.with_name(f".tmp-{file.name}")
    try:
        save_file({_SLAB: slab}, staging, metadata={_TABLE: json.dumps(table.to_json())})
        os.replace(staging, file)
    finally:
        staging.unlink(missing_ok=True)


def map_member(file: Path) -> tuple[Tensor, Table]:
    """The slab of a file, mapped and to be read only, and its table.

    Raises:
        CheckpointError: no such file, or what it holds is no checkpoint of a pool; names it.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            slab = opened.get_tensor(_SLAB)
            table = Table.from_json(json.loads((opened.metadata() or {})[_TABLE]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{file}: no checkpoint of a reference pool ({problem})") from problem
    if slab.dtype != torch.uint8 or slab.shape != (table.size,):
        raise CheckpointError(f"{file}: holds {tuple(slab.shape)} {slab.dtype}, not a slab of {table.size} bytes")
    return slab, table


def save_members(folder: Path, members: Sequence[Member], table: Table) -> None:
    """Writes all checkpoints and their manifest into a folder that appears whole or not at all.

    Args:
        folder: must not exist yet.
        members: in order; one that is a file already is linked, not written again, where the file system can.
        table: of them all.

    Raises:
        CheckpointError: the disk refuses.
    """
    with staged_folder(folder, CheckpointError) as staging:
        rows = []
        for index, member in enumerate(members):
            name = member_name(index)
            if member.file is None:
                write_member(staging / name, member.slab.cpu(), table)
            else:
                _link(member.file, staging / name)
            rows.append({"file": name, "size": (staging / name).stat().st_size, "sha256": digest(staging / name)})
        tree = {"format": FORMAT, "members": rows}
        (staging / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def checked_members(folder: Path) -> list[Path]:
    """The files of a saved pool, in order, each compared with its size and checksum.

    Raises:
        CheckpointError: a manifest that cannot be read or is of a newer format; a file that is missing or damaged. It
            names them all.
    """
    manifest = folder / MANIFEST
    try:
        tree: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        if int(tree["format"]) > FORMAT:
            raise CheckpointError(f"{manifest}: format {tree['format']} is newer than this version of seppo_fast reads")
        rows = [(str(row["file"]), int(row["size"]), str(row["sha256"])) for row in tree["members"]]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise CheckpointError(f"{manifest}: no manifest of a reference pool ({problem})") from problem
    damaged = []
    for index, (name, size, checksum) in enumerate(rows):
        file = folder / name
        if name != member_name(index):  # also keeps paths inside the folder
            damaged.append(f"{name}: {member_name(index)} is expected")
        elif not file.is_file():
            damaged.append(f"{name}: missing")
        elif file.stat().st_size != size:
            damaged.append(f"{name}: {file.stat().st_size} bytes, {size} were written")
        elif digest(file) != checksum:
            damaged.append(f"{name}: damaged, its checksum differs")
    if damaged:
        raise CheckpointError(f"{folder}: {len(damaged)} of {len(rows)} checkpoints: " + "; ".join(damaged))
    return [folder / name for name, _, _ in rows]


def member_name(index: int) -> str:
    """The file of a checkpoint."""
    return f"checkpoint-{index:06d}.safetensors"


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    sha = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            sha.update(block)
    return sha.hexdigest()
