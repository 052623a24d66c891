"""Arrays with a row per file, computed chunk by chunk into files: resumable, and shared by several processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from seppo_fast.evaluation.media.items import READERS
from seppo_fast.evaluation.media.work import alone, unfinished
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import remove_temporary, write_atomically
from seppo_fast.utils.progress import progress

_KEY = "seppo_fast"  # of the metadata; a single key, because safetensors writes several in any order

Pictures = tuple[np.ndarray, ...]  # a picture or clip, and for pairs its counterpart


class MetricError(Exception):
    """A metric's features or values could not be computed."""


@dataclass(frozen=True)
class Stamp:
    """What an array was computed from.

    Attributes:
        digest: the digest of the metric's weights and rules.
        names: the digest of the files' names, empty if they do not matter.
        contents: the digest of the files' contents.
    """

    digest: str
    names: str
    contents: str

    @property
    def short(self) -> str:
        """A short digest of all of them, for names of files."""
        return _joined([self.digest, self.names, self.contents])[:12]


@dataclass(frozen=True)
class Rows:
    """The files that get a row of an array each.

    Attributes:
        name: the end of the array's file name.
        names: the digest of the files' names, see `names_digest`; empty for real pictures, of which only the content
            matters.
        contents: a digest of each file's content.
        load: loads what file number n is measured by; may raise DataError.
        chunk: how many files are loaded at once.
    """

    name: str
    names: str
    contents: Sequence[str]
    load: Callable[[int], Pictures]
    chunk: int

    def stamp(self, digest: str) -> Stamp:
        """Returns the stamp of their array under a metric's digest."""
        return Stamp(digest, self.names, _joined(self.contents))


def names_digest(names: Sequence[str]) -> str:
    """Returns a digest of files' names in order."""
    return _joined(names)


def read_array(file: Path) -> tuple[Stamp, np.ndarray] | None:
    """Returns an array and what it was computed from; None if the file is missing, damaged or another kind of file."""
    stamp = read_stamp(file)
    try:
        with safe_open(file, framework="np") as opened:
            return None if stamp is None else (stamp, opened.get_tensor("values"))
    except (SafetensorError, OSError):
        return None


def read_stamp(file: Path) -> Stamp | None:
    """Returns what an array was computed from, without reading it; None as in `read_array`."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as opened:
            return Stamp(**json.loads((opened.metadata() or {})[_KEY]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def fill(
    file: Path,
    rows: Rows,
    digest: str,
    unit: str,
    compute: Callable[[list[Pictures]], np.ndarray],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Writes the array of some files, unless it exists; finished chunks are kept beside it in `.parts/`.

    Args:
        file: the array's file.
        rows: the files that get a row each.
        digest: the digest of the metric's weights and rules.
        unit: what is counted, for the display of progress.
        compute: computes the rows of a chunk.
        rank: this process's rank.
        world: the number of processes.

    Raises:
        MetricError: `compute` raised it, or chunks have rows of different sizes.
        DataError: a file cannot be loaded.
        CheckpointError: a file cannot be written, or was removed or damaged meanwhile.
    """
    whole = rows.stamp(digest)
    if read_stamp(file) == whole:
        return
    total, parts = len(rows.contents), file.parent / ".parts" / file.stem
    chunks = [range(start, min(start + rows.chunk, total)) for start in range(0, total, rows.chunk)]
    stamps = [Stamp(digest, "", _joined([rows.contents[row] for row in chunk])) for chunk in chunks]
    # Commands with other real files or weights share the folder, but not the names.
    places = [parts / f"{chunk.start}-{stamp.short}.safetensors" for chunk, stamp in zip(chunks, stamps)]

    def part(number: int) -> np.ndarray | None:
        """Returns a finished chunk; None if it is missing, damaged, or of other files or weights."""
        found = read_array(places[number])
        return None if found is None or (found[0], len(found[1])) != (stamps[number], len(chunks[number])) else found[1]

    def done(number: int) -> bool:
        return part(number) is not None

    have = sum(len(chunk) for number, chunk in enumerate(chunks) if done(number))
    with progress(total, "measured", unit, initial=have) as advance, ThreadPoolExecutor(READERS) as readers:
        for number in unfinished(parts / ".lock", len(chunks), done, rank, world):
            remove_temporary(parts, {places[number].name})
            values = compute(list(readers.map(rows.load, chunks[number])))
            assert len(values) == len(chunks[number])
            fault("metric-write")
            write_atomically(places[number], _packed(values, stamps[number]), CheckpointError)
            advance(len(chunks[number]))
    arrays = [array for number in range(len(chunks)) if (array := part(number)) is not None]
    if len(arrays) < len(chunks):
        raise CheckpointError(f"{parts}: a file was removed or damaged while the array was assembled; rerun")
    if len({array.shape[1:] for array in arrays}) > 1:
        sizes = ", ".join(map(str, sorted({array.shape[1:] for array in arrays})))
        raise MetricError(f"its features have different sizes: {sizes}")
    with alone(file.parent, {file.name}):
        write_atomically(file, _packed(np.concatenate(arrays), whole), CheckpointError)


def _packed(values: np.ndarray, stamp: Stamp) -> bytes:
    return save({"values": np.ascontiguousarray(values)}, {_KEY: json.dumps(asdict(stamp))})


def _joined(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
