"""Saved states of a run as folders: whole or absent, checked by size and checksum, the newest good one found again.

    state/update-000030/   manifest.json  numbers.json  policy.safetensors  optimizer.safetensors  ...  references/

Only safetensors and JSON: nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seppo_fast.references.storage import checked_checkpoints
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import disk_message, free_name, read_json, staged_folder
from seppo_fast.utils.logging import say
from seppo_fast.utils.manifest import MANIFEST, FileRow

FORMAT = 1
NUMBERS, REFERENCES = "numbers.json", "references"
_NAME = re.compile(r"update-(\d{6,})")


class NewerFormatError(CheckpointError):
    """A state that a newer version of the package wrote."""


@dataclass(frozen=True)
class SavedState:
    """A saved state whose files have been checked.

    Attributes:
        folder: it lies in.
        update: finished updates.
        numbers: all that is no tensor.
    """

    folder: Path
    update: int
    numbers: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of the file `name`.safetensors, on the CPU.

        Raises:
            CheckpointError: no such file.
        """
        file = self.folder / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(f"{file}: cannot be read: {problem}") from problem


def state_folder(run: Path, update: int) -> Path:
    """Where the state after `update` finished updates is saved."""
    return run / "state" / f"update-{update:06d}"


def write_state(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    numbers: Mapping[str, Any],
    write_references: Callable[[Path], None] | None,
) -> None:
    """Writes a state into a folder that appears whole or not at all.

    Args:
        folder: `state_folder`; must not exist yet.
        files: contiguous tensors on the CPU, by file (without its suffix) and name.
        numbers: JSON.
        write_references: writes the past policies, with a manifest of their own, into a folder that is to be made.

    Raises:
        CheckpointError: the disk refuses.
    """
    with staged_folder(folder, CheckpointError) as staging:
        for name, tensors in files.items():
            fault(f"save-{name}")
            save_file(dict(tensors), staging / f"{name}.safetensors")
        (staging / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        if write_references is not None:
            fault("save-references")
            write_references(staging / REFERENCES)
        rows = {}
        # Of the past policies their own manifest, which has the checksums of the rest.
        for file in sorted([*staging.glob("*"), *staging.glob(f"{REFERENCES}/{MANIFEST}")]):
            if file.is_file():
                table = {"tensors": _table(file)} if file.suffix == ".safetensors" else {}
                rows[str(file.relative_to(staging))] = FileRow.of(file).to_json() | table
        fault("save-manifest")
        tree = {"format": FORMAT, "sha256": _checksum(rows), "files": rows}
        (staging / MANIFEST).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        fault("save-rename")
    fault("save-done")


def saved_states(run: Path) -> list[Path]:
    """The folders of saved states, newest first; nothing of them is looked at.

    Raises:
        CheckpointError: the folder that holds them exists and cannot be listed.
    """
    states = run / "state"
    try:
        # A link that leads nowhere is a disk that is not mounted.
        if not run.is_dir() or not (states.exists() or states.is_symlink()):
            return []
        folders = [path for path in states.iterdir() if _NAME.fullmatch(path.name)]
    except OSError as problem:
        raise CheckpointError(
            f"{states}: the saved states cannot be listed ({problem.strerror}). Nothing was changed; make this folder "
            "readable"
        ) from problem
    return sorted(folders, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("update-"))


def newest_state(run: Path) -> SavedState | None:
    """The newest state that is whole; None where none was ever saved.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: there are states, and all are damaged, or one is of a newer format. Nothing is deleted.
    """
    folders = saved_states(run)
    for folder in folders:
        try:
            return checked_state(folder)
        except NewerFormatError:
            raise  # an older state would lose what a newer version did
        except CheckpointError as problem:
            say(f"{problem}; looking for an older state")
    if folders:
        raise CheckpointError(
            f"{run / 'state'}: none of its {len(folders)} saved states can be used. Nothing was deleted; restore one "
            "from a copy, or choose another output to begin anew"
        )
    return None


def checked_state(folder: Path) -> SavedState:
    """A state, every file of which has the size and the checksum that its manifest gives.

    Raises:
        CheckpointError: what is wrong; every damaged file is named.
    """
    manifest = folder / MANIFEST
    try:
        tree = read_json(manifest)
        if int(tree["format"]) > FORMAT:
            raise NewerFormatError(
                f"{manifest}: format {tree['format']} is newer than this version of seppo_fast reads; take the version "
                "that wrote it"
            )
        if _checksum(tree["files"]) != tree["sha256"]:
            raise ValueError("its own checksum differs")
        rows = {str(name): FileRow.read(row) for name, row in tree["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise CheckpointError(f"{manifest}: no manifest of a saved state ({problem})") from problem
    damaged = list(_damages(folder, rows))
    if damaged:
        raise CheckpointError(f"{folder}: " + "; ".join(damaged))
    if f"{REFERENCES}/{MANIFEST}" in rows:
        checked_checkpoints(folder / REFERENCES)
    try:
        numbers = read_json(folder / NUMBERS)
        return SavedState(folder, int(numbers["update"]), dict(numbers))
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as problem:
        raise CheckpointError(f"{folder / NUMBERS}: cannot be read ({problem})") from problem


def put_aside_newer(run: Path, update: int) -> None:
    """Renames the damaged states after `update` to `damaged-...`, so that they count for nothing and stay.

    For the one process that holds the run's lock.

    Raises:
        CheckpointError: the disk refuses.
    """
    for folder in saved_states(run):
        if _number(folder) > update:
            try:
                folder.rename(free_name(folder.with_name(f"damaged-{folder.name}")))
            except OSError as problem:
                raise CheckpointError(disk_message(folder, problem)) from problem


def prune(run: Path, keep: int) -> None:
    """Removes the oldest saved states beyond `keep`, and what killed processes left half written.

    For the one process that holds the run's lock.
    """
    for folder in saved_states(run)[keep:]:
        # Renamed first: a folder that is half removed must not pass for a state.
        gone = folder.with_name(f".tmp-{folder.name}-old")
        folder.rename(gone)
        fault("prune")
        shutil.rmtree(gone, ignore_errors=True)
    for left in (run / "state").glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)


def _damages(folder: Path, rows: Mapping[str, FileRow]) -> Iterator[str]:
    if NUMBERS not in rows:
        yield f"{NUMBERS} is not in the manifest"
    for name, row in rows.items():
        if problem := row.damage(folder, name):
            yield f"{name} {problem}"


def _checksum(rows: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _table(file: Path) -> dict[str, list[Any]]:
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        return {name: [part.get_dtype(), *part.get_shape()] for name, part in slices.items()}
