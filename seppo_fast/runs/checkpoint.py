"""Saved states of a run: written atomically as folders, checked by size and checksum; the newest intact one is used.

    state/update-000030/   manifest.json  numbers.json  policy.safetensors  optimizer.safetensors  ...  references/

Only safetensors and JSON files: nothing is unpickled.
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
from seppo_fast.utils.files import disk_message, free_name, link_or_copy, read_json, staged_folder
from seppo_fast.utils.logging import say
from seppo_fast.utils.manifest import MANIFEST, FileRow

FORMAT = 1
NUMBERS, REFERENCES = "numbers.json", "references"
_NAME = re.compile(r"update-(\d{6,})")


class NewerFormatError(CheckpointError):
    """The state was written by a newer version of the package."""


@dataclass(frozen=True)
class SavedState:
    """A saved state whose files have been checked.

    Attributes:
        folder: the state's folder.
        update: number of finished updates.
        numbers: everything that is not a tensor.
    """

    folder: Path
    update: int
    numbers: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Returns the tensors of the file `name`.safetensors, on the CPU.

        Raises:
            CheckpointError: the file is missing or cannot be read.
        """
        file = self.folder / f"{name}.safetensors"
        try:
            return load_file(file)
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(f"{file}: cannot be read: {problem}") from problem


def state_folder(run: Path, update: int) -> Path:
    """Returns the folder for the state after `update` finished updates."""
    return run / "state" / f"update-{update:06d}"


def write_state(
    folder: Path,
    files: Mapping[str, Mapping[str, Tensor]],
    numbers: Mapping[str, Any],
    write_references: Callable[[Path], None] | None,
    links: Mapping[str, Path] | None = None,
) -> None:
    """Writes a state atomically: the folder appears complete or not at all.

    Args:
        folder: the result of `state_folder`; must not exist yet.
        files: contiguous CPU tensors, by file name (without suffix) and tensor name.
        numbers: everything that is not a tensor; must be serializable as JSON.
        write_references: creates the given folder and writes the past policies into it, with their own manifest.
        links: files that exist already, under the names that they get in the state; it holds hard links to them.

    Raises:
        CheckpointError: the disk is full, read-only or otherwise not writable.
    """
    with staged_folder(folder, CheckpointError) as staging:
        for name, tensors in files.items():
            fault(f"save-{name}")
            save_file(dict(tensors), staging / f"{name}.safetensors")
        for name, file in (links or {}).items():
            link_or_copy(file, staging / name)
        (staging / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        if write_references is not None:
            fault("save-references")
            write_references(staging / REFERENCES)
        rows = {}
        # Of references/ only its manifest is listed; that one holds the checksums of the other files there.
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
    """Returns the folders of saved states, newest first, without checking their contents.

    Raises:
        CheckpointError: the folder that holds them exists but cannot be listed.
    """
    states = run / "state"
    try:
        # A dangling link points to a disk that is not mounted; it must raise below, not count as "no states".
        if not run.is_dir() or not (states.exists() or states.is_symlink()):
            return []
        folders = [path for path in states.iterdir() if _NAME.fullmatch(path.name)]
    except OSError as problem:
        raise CheckpointError(
            f"{states}: the saved states cannot be listed ({problem.strerror}). Nothing was changed; make this folder "
            "readable and rerun"
        ) from problem
    return sorted(folders, key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("update-"))


def newest_state(run: Path) -> SavedState | None:
    """Returns the newest intact state, or None if no state was ever saved.

    Args:
        run: the run's folder.

    Raises:
        CheckpointError: all saved states are damaged, or one that is newer than any intact one has a newer format.
            Nothing is deleted.
    """
    folders = saved_states(run)
    for folder in folders:
        try:
            return checked_state(folder)
        except NewerFormatError:
            raise  # falling back to an older state would lose the newer version's progress
        except CheckpointError as problem:
            say(f"{problem}; looking for an older state")
    if folders:
        raise CheckpointError(
            f"{run / 'state'}: none of its {len(folders)} saved states can be used. Nothing was deleted; restore one "
            "from a copy, or choose another output to start over"
        )
    return None


def checked_state(folder: Path) -> SavedState:
    """Returns a state after checking the size and checksum of every file against its manifest.

    Raises:
        CheckpointError: the manifest cannot be read, or files are damaged; the message names each of them.
    """
    manifest = folder / MANIFEST
    try:
        tree = read_json(manifest)
        if int(tree["format"]) > FORMAT:
            raise NewerFormatError(
                f"{manifest}: format {tree['format']} is newer than this version of seppo_fast reads; use the version "
                "that wrote it"
            )
        if _checksum(tree["files"]) != tree["sha256"]:
            raise ValueError("its content does not match its own checksum")
        rows = {str(name): FileRow.read(row) for name, row in tree["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise CheckpointError(f"{manifest}: not a valid manifest of a saved state ({problem})") from problem
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
    """Renames all states after `update` to `damaged-...`: they are kept, but never loaded or pruned.

    `update` is the update of the state from which the run resumes. `newest_state` chose it because every newer state
    failed its checks.

    Called only by the process that holds the run's lock.

    Raises:
        CheckpointError: a folder cannot be renamed.
    """
    for folder in saved_states(run):
        if _number(folder) > update:
            try:
                folder.rename(free_name(folder.with_name(f"damaged-{folder.name}")))
            except OSError as problem:
                raise CheckpointError(disk_message(folder, problem)) from problem


def prune(run: Path, keep: int) -> None:
    """Removes all but the newest `keep` saved states, and `.tmp-*` folders, which killed processes left incomplete.

    Called only by the process that holds the run's lock.
    """
    for folder in saved_states(run)[keep:]:
        # Renamed first: a half-removed folder must not be mistaken for a state.
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
    """Returns [dtype, *shape] of each tensor in a safetensors file, by the tensor's name; the manifest lists this."""
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - `opened` is not a mapping
        return {name: [part.get_dtype(), *part.get_shape()] for name, part in slices.items()}
