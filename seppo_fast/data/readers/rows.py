"""The rows of a table: local parquet files, read in place, or a data set of the Hugging Face hub.

Local parquet is not opened through `datasets`, which would first write all of it again as Arrow files into its cache
(335 GB for Pick-a-Pic v2). A hub data set does go through `datasets`, which downloads it and keeps such a copy under
HF_DATASETS_CACHE (by default HF_HOME/datasets); here it is memory-mapped.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seppo_fast.data.examples import Source
from seppo_fast.data.names import relative_name, utf8_name
from seppo_fast.data.readers.tables import Rows, TableSource
from seppo_fast.utils.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_DISK_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def open_parquet(spec: str, files: Sequence[Path], folder: Path) -> Source:
    """Opens parquet files as one table, with rows named by their file's path below `folder`; raises DataError."""
    return TableSource(spec, ParquetRows(files, folder))


def open_hub(spec: str, split: str) -> Source:
    """Opens one split of the hub data set `owner/name`; raises DataError. Never runs code from the hub."""
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    try:
        dataset = datasets.load_dataset(spec, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{spec}: no such local path, and no such data set on the hub that this login can read ({error}). Check "
            "the name; for a gated data set, accept its terms and run `hf auth login`."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{spec}: no such local path, and the hub cannot be reached ({error}). Go online once to download it "
            "(unset HF_HUB_OFFLINE), or give the path of a local copy."
        ) from error
    except Exception as error:
        cause = _disk_error(error)
        if cause is not None:
            raise DataError(
                f"{spec}: the datasets library cannot write its cache, {HF_DATASETS_CACHE} ({cause.strerror}). "
                "Set HF_HOME to a writable folder with room for the whole data set."
            ) from error
        raise DataError(f"{spec}, split {split!r}: the datasets library cannot load it: {error}") from error
    return TableSource(spec, HubRows(spec, dataset))


def _disk_error(error: BaseException) -> OSError | None:
    """Returns the failed write that caused an error of `datasets`, which wraps errors in preparing data, or None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRNOS:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


class ParquetRows(Rows):
    """The concatenated rows of parquet files; columns that only some files have are not read.

    Images are read `STRETCH` rows at a time and the last two stretches are kept, so that reading in order reads each
    byte once. Memory holds one page per image column (1024 rows for most writers), however large a row group is.
    Going back further than the kept stretches restarts the row group.
    """

    STRETCH = 32

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        import pyarrow.parquet as pq

        self._files = list(files)
        self._labels = [relative_name(path, folder) for path in files]
        self._readers = []
        for path in files:
            try:
                # Arrow expects UTF-8 names in every locale; pre_buffer would hold a whole row group in memory
                self._readers.append(pq.ParquetFile(utf8_name(str(path)), memory_map=True, pre_buffer=False))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: not a readable parquet file ({error}).") from error
        names = [reader.schema_arrow.names for reader in self._readers]
        self.columns = dict(zip(map(str, files), names, strict=True))
        # the first row of every row group, with its file and its number in the file
        groups = [(f, g) for f, reader in enumerate(self._readers) for g in range(reader.num_row_groups)]
        sizes = [self._readers[f].metadata.row_group(g).num_rows for f, g in groups]
        self._groups = groups
        self._group_starts = np.array([0, *accumulate(sizes)])
        self._file_starts = [0, *accumulate(reader.metadata.num_rows for reader in self._readers)]
        self._current = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._stretches: deque[tuple[int, pa.RecordBatch]] = deque(maxlen=2)
        self._next = 0
        self._damage: dict[int, tuple[int, str]] = {}

    def __len__(self) -> int:
        return int(self._group_starts[-1])

    def row_name(self, row: int) -> str:
        file = self._groups[self._group_of(row)][0]
        return f"{self._labels[file]}:{row - self._file_starts[file]}"

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._group_starts, row, side="right")) - 1

    def read_columns(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        for path, reader in zip(self._files, self._readers, strict=True):
            try:
                yield str(path), reader.read(columns=list(columns))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: columns {', '.join(columns)} cannot be read ({error}).") from error

    def read_images(self, row: int, columns: Sequence[str]) -> dict[str, bytes | None]:
        group = self._group_of(row)
        if group != self._current or (self._stretches and row < self._stretches[0][0]):
            file, inside = self._groups[group]
            self._batches = self._readers[file].iter_batches(self.STRETCH, row_groups=[inside], columns=list(columns))
            self._current, self._next = group, int(self._group_starts[group])
            self._stretches.clear()
        while row >= self._next:
            self._read_stretch(group)
        start, batch = next(item for item in reversed(self._stretches) if item[0] <= row)
        return {name: _cell_bytes(batch.column(name)[row - start].as_py()) for name in columns}

    def _read_stretch(self, group: int) -> None:
        """Decodes the next stretch of the open row group; remembers damage, which is slow to detect again."""
        if group in self._damage and self._next >= self._damage[group][0]:
            raise ValueError(self._damage[group][1])
        try:
            batch = next(self._batches)
        except (OSError, ValueError, StopIteration) as error:
            self._damage[group] = (self._next, f"its row group is damaged ({error})")
            raise ValueError(self._damage[group][1]) from error
        self._stretches.append((self._next, batch))
        self._next += batch.num_rows

    def digest(self) -> str:
        """Digests names, sizes and footers; a footer holds the offset and length of column data, and statistics.

        Overwriting an image in place with another of the same length goes unnoticed; hashing everything would read as
        much as encoding, at every start.
        """
        sha = hashlib.sha256()
        for label, path in zip(self._labels, self._files, strict=True):
            size = path.stat().st_size
            with open(path, "rb") as file:
                file.seek(-8, 2)
                length = int.from_bytes(file.read(4), "little")
                file.seek(-8 - length, 2)
                sha.update(json.dumps([label, size]).encode() + file.read(length))
        return sha.hexdigest()


class HubRows(Rows):
    """The rows of a hub data set, memory-mapped by `datasets`."""

    def __init__(self, spec: str, dataset: datasets.Dataset) -> None:
        from datasets import Image

        for name, feature in dataset.features.items():
            if isinstance(feature, Image):
                dataset = dataset.cast_column(name, Image(decode=False))
        self._spec = spec
        self._dataset = dataset
        self._views: dict[tuple[str, ...], datasets.Dataset] = {}
        self.columns = {spec: dataset.column_names}

    def __len__(self) -> int:
        return len(self._dataset)

    def row_name(self, row: int) -> str:
        return f"{self._spec}:{row}"

    def read_columns(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        yield self._spec, self._dataset.select_columns(list(columns)).with_format("arrow")[:]

    def read_images(self, row: int, columns: Sequence[str]) -> dict[str, bytes | None]:
        view = self._views.get(tuple(columns))
        if view is None:
            view = self._views[tuple(columns)] = self._dataset.select_columns(list(columns))
        cells = view[row]
        for name, cell in cells.items():
            if isinstance(cell, dict) and cell["bytes"] is None and cell["path"]:
                # A hub data set of loose files: `datasets` downloaded the file and set this path, so it is safe.
                cells[name] = Path(cell["path"]).read_bytes()
        return {name: _cell_bytes(cell) for name, cell in cells.items()}

    def digest(self) -> str:
        """Digests the name and the Arrow files' folders, names and sizes; the folder is the hub's commit."""
        files = [Path(entry["filename"]) for entry in self._dataset.cache_files]
        listing = [[path.parent.name, path.name, path.stat().st_size] for path in files]
        return hashlib.sha256(json.dumps([self._spec, listing]).encode()).hexdigest()


def _cell_bytes(cell: Any) -> bytes | None:
    """Returns the image in a cell: plain bytes, or those in the {"bytes", "path"} struct that `datasets` stores.

    The path is not followed: a downloaded table could name any file of this machine.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None or isinstance(content, bytes):
        return content
    raise ValueError(f"the cell holds {type(content).__name__}, not an encoded image")
