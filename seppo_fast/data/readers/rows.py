"""Where a table's rows lie: local parquet files, read in place, or a data set of the Hugging Face hub.

Local parquet is not opened through `datasets`: that would first write all of it again as Arrow files into that
library's cache (335 GB for Pick-a-Pic v2). A hub data set does go through `datasets`, which downloads it and keeps such
a copy under HF_DATASETS_CACHE (by default HF_HOME/datasets), memory-mapped here.
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
    """Parquet files as one table, rows named by their file's path in `folder`; raises DataError."""
    return TableSource(spec, ParquetRows(files, folder))


def open_hub(spec: str, split: str) -> Source:
    """One split of the hub data set `owner/name`; raises DataError. No code from the hub is ever run."""
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    try:
        dataset = datasets.load_dataset(spec, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{spec}: no such folder here, and no such data set on the hub that this login may read ({error}). Check "
            "the name; a gated one needs its terms accepted and `hf auth login`."
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{spec}: no such folder here, and the hub cannot be reached ({error}). Go online once to download it "
            "(unset HF_HUB_OFFLINE), or give the path of a local copy."
        ) from error
    except Exception as error:
        cause = _disk_error(error)
        if cause is not None:
            raise DataError(
                f"{spec}: the datasets library cannot write its cache, {HF_DATASETS_CACHE} ({cause.strerror}). "
                "Set HF_HOME to a folder that can be written and has room for the whole data set."
            ) from error
        raise DataError(f"{spec}, split {split!r}: the datasets library cannot load it: {error}") from error
    return TableSource(spec, HubRows(spec, dataset))


def _disk_error(error: BaseException) -> OSError | None:
    """The failed write behind an error of `datasets`, which wraps those that happen while it prepares the data."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRNOS:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


class ParquetRows(Rows):
    """Parquet files, one after the other; of columns that only some of them hold, nothing is read.

    Images are taken `STRETCH` rows at a time and the last two stretches kept, so that reading in order costs each byte
    once. In memory is a page of each image column (1024 rows as most writers have it), however large a row group is.
    Going further back than those stretches starts the row group again.
    """

    STRETCH = 32

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        import pyarrow.parquet as pq

        self._files = list(files)
        self._labels = [relative_name(path, folder) for path in files]
        self._readers = []
        for path in files:
            try:
                # Arrow takes names for UTF-8 in every locale; pre_buffer would hold the whole row group's bytes
                self._readers.append(pq.ParquetFile(utf8_name(str(path)), memory_map=True, pre_buffer=False))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: not a readable parquet file ({error}).") from error
        names = [reader.schema_arrow.names for reader in self._readers]
        self.columns = dict(zip(map(str, files), names, strict=True))
        # first row of every row group of every file, with the file and the group in it
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
        """Decodes the next stretch of the open row group; its damage is remembered, as finding it again is slow."""
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
        """Over names, sizes and footers: a footer holds every page's place and length, and columns' statistics.

        An image overwritten in place by another of the same length is not noticed; hashing it all would read, at
        every start, as much as encoding does.
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
    """A data set of the hub, memory-mapped by `datasets`."""

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
                # a hub folder of loose images: `datasets` downloaded the file and wrote this path itself
                cells[name] = Path(cell["path"]).read_bytes()
        return {name: _cell_bytes(cell) for name, cell in cells.items()}

    def digest(self) -> str:
        """Over the name and the Arrow files' sizes and names, whose folder is the hub's commit."""
        files = [Path(entry["filename"]) for entry in self._dataset.cache_files]
        listing = [[path.parent.name, path.name, path.stat().st_size] for path in files]
        return hashlib.sha256(json.dumps([self._spec, listing]).encode()).hexdigest()


def _cell_bytes(cell: Any) -> bytes | None:
    """The image in a cell: bytes as they are, or inside the {"bytes", "path"} that `datasets` stores.

    The path is not followed: a table from elsewhere could name any file of this machine.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None or isinstance(content, bytes):
        return content
    raise ValueError(f"the cell holds {type(content).__name__}, not an encoded image")
