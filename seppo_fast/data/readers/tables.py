"""Interprets the columns of a table: labelled pairs in Pick-a-Pic's schema, or captioned images."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from seppo_fast.data.captions import MAX_CAPTION_BYTES, TEXT_COLUMNS
from seppo_fast.data.examples import Example, Problem, Source, ties_note
from seppo_fast.data.media.colours import can_convert
from seppo_fast.data.media.images import ImageRef, bytes_ref
from seppo_fast.utils.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")


class Rows(ABC):
    """The rows of a table in one or more parts, such as files; `columns` maps each part's name to its columns."""

    columns: Mapping[str, Sequence[str]]

    @property
    def names(self) -> list[str]:
        """The columns that all parts have, in the order of the first part."""
        first, *others = self.columns.values()
        return [name for name in first if all(name in other for other in others)]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row_name(self, row: int) -> str:
        """Returns a row's readable name, which is the example's id: unique, and the same on every machine."""

    @abstractmethod
    def read_columns(self, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
        """Yields (name, whole columns) of each part; column types may differ between parts. Raises DataError."""

    @abstractmethod
    def read_images(self, row: int, columns: Sequence[str]) -> dict[str, bytes | None]:
        """Returns the encoded images in one row; raises OSError or ValueError."""

    @abstractmethod
    def digest(self) -> str:
        """Returns a sha256 (hex) that changes with the images; `TableSource` adds captions and labels."""


class TableSource(Source):
    """A data set of labelled pairs in the Pick-a-Pic schema, or of captioned images, from any `Rows`."""

    def __init__(self, spec: str, rows: Rows) -> None:
        pairs = set(PAIR_COLUMNS) <= set(rows.names)
        super().__init__(spec, has_losers=pairs)
        self._rows = rows
        if pairs:
            self._images, texts = ["jpg_0", "jpg_1"], ["caption"]
        else:
            self._images, texts = _columns(spec, rows, IMAGE_COLUMNS)[:1], _columns(spec, rows, TEXT_COLUMNS)
        self._captions = _captions(rows, texts)
        winners = _winners(rows) if pairs else np.zeros(len(rows), dtype=np.int8)
        self.ties = int((winners == _TIE).sum())
        if self.ties:
            self.notes.append(ties_note(self.ties, len(rows)))
        self._select(winners)

    def _select(self, winners: np.ndarray) -> None:
        """Keeps the rows with a winner and a caption; the others become problems, except ties."""
        import pyarrow.compute as pc

        def chosen(condition: pa.ChunkedArray) -> np.ndarray:
            return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)

        there = chosen(pc.greater(pc.utf8_length(self._captions), 0))
        long = chosen(pc.greater(pc.binary_length(self._captions), MAX_CAPTION_BYTES))
        nul = chosen(pc.match_substring(self._captions, "\0"))
        usable = there & ~long & ~nul
        self._kept = np.flatnonzero((winners >= 0) & usable)
        self._winners = winners[self._kept]
        for row in np.flatnonzero((winners == _UNCLEAR) | ((winners >= 0) & ~usable)):
            if winners[row] == _UNCLEAR:
                reason = "the labels name no winner (one must be 1, the other 0)"
            elif not there[row]:
                reason = "the caption is empty"
            elif long[row]:
                reason = f"the caption is longer than {MAX_CAPTION_BYTES} bytes: not a caption"
            else:
                reason = "the caption holds NUL characters: not text"
            self.problems.append(Problem(self._rows.row_name(int(row)), reason))

    def __len__(self) -> int:
        return len(self._kept)

    def _example(self, index: int) -> Example:
        row, winner = int(self._kept[index]), int(self._winners[index])
        loser = self._ref(row, self._images[1 - winner]) if self.has_losers else None
        return Example(
            self._rows.row_name(row), self._captions[row].as_py(), self._ref(row, self._images[winner]), loser
        )

    def labels(self) -> list[tuple[str, object]]:
        """See `Source`."""
        if "label" not in self._rows.names:
            return [(self._rows.row_name(int(row)), None) for row in self._kept]
        labels = [
            label for _, table in self._rows.read_columns(["label"]) for label in _labels(table, "label").to_pylist()
        ]
        return [(self._rows.row_name(int(row)), labels[row]) for row in self._kept]

    def _ref(self, row: int, column: str) -> ImageRef:
        return bytes_ref(f"{self._rows.row_name(row)} {column}", partial(self._read_cell, row, column))

    def _read_cell(self, row: int, column: str) -> bytes | None:
        return self._rows.read_images(row, self._images)[column]

    def digest(self) -> str:
        """Digests the images through `Rows.digest`, which rows are used, their winners and captions.

        Which images have a colour profile is unknown until they are decoded. Hence the keys of all tables' caches
        changed when profiles began to be applied.
        """
        sha = hashlib.sha256(self._rows.digest().encode())
        sha.update(b"in sRGB" if can_convert() else b"")
        sha.update(self._kept.astype("<i8").tobytes())
        sha.update(self._winners.astype("<i1").tobytes())
        for caption in self._captions:
            sha.update(json.dumps(caption.as_py()).encode())
        return sha.hexdigest()


_TIE, _UNCLEAR = -1, -2


def _winners(rows: Rows) -> np.ndarray:
    """Returns per row the winner: 0 or 1 (its label is 1, the other 0), _TIE if labels are equal, else _UNCLEAR."""
    labels: list[np.ndarray] = []
    for part, table in rows.read_columns(["label_0", "label_1"]):
        try:
            # A missing label becomes NaN, which compares unequal to everything.
            columns = [_labels(table, name).cast("float64").to_numpy() for name in ("label_0", "label_1")]
        except (ValueError, NotImplementedError) as error:
            raise DataError(f"{part}: label_0 and label_1 must be numbers ({error}).") from error
        labels.append(np.stack(columns).astype(np.float64))
    first, second = np.concatenate(labels, axis=1)
    winners = np.full(len(first), _UNCLEAR, dtype=np.int8)
    winners[first == second] = _TIE
    winners[(first == 1) & (second == 0)] = 0
    winners[(first == 0) & (second == 1)] = 1
    return winners


def _labels(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Returns a column of labels, with the names of a ClassLabel of `datasets` in place of its integers.

    The integers alone say nothing: 0 may stand for "like". One without a name, such as -1, is a missing label.
    """
    import pyarrow as pa

    column, names = table.column(name), _class_names(table.schema.metadata or {}, name)
    if names is None or pa.types.is_nested(column.type):
        return column
    by_number = dict(enumerate(names))
    return pa.chunked_array([pa.array([by_number.get(label) for label in column.to_pylist()], pa.string())])


def _class_names(metadata: Mapping[bytes, bytes], name: str) -> list[str] | None:
    """Returns the names of a ClassLabel column, which `datasets` writes into a table's metadata; None for another."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][name]
        return [str(word) for word in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):  # there is no such metadata, or it is not from `datasets`
        return None


def _captions(rows: Rows, names: Sequence[str]) -> pa.ChunkedArray:
    """Returns per row the first non-blank text of these columns, else null or an empty text."""
    import pyarrow.compute as pc

    captions, held, refused = None, None, None
    for name in names:
        if held is not None and pc.all(held).as_py():
            break
        try:
            column = _texts(rows, name)
        except DataError as error:
            refused = refused or error
            continue
        captions = column if captions is None else pc.if_else(held, captions, column)
        held = pc.fill_null(pc.greater(pc.utf8_length(captions), 0), False)
    if captions is None:
        assert refused is not None
        raise refused
    return captions


def _texts(rows: Rows, name: str) -> pa.ChunkedArray:
    """Returns a text column as one type, without byte order marks and surrounding white space; raises DataError."""
    import pyarrow as pa
    import pyarrow.compute as pc

    chunks: list[pa.Array] = []
    for part, table in rows.read_columns([name]):
        column = table.column(name)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if str(kind).removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
            raise DataError(f"{part}: column {name} must hold text, but it holds {column.type}.")
        try:
            column = column.cast(pa.large_string())
        except ValueError as error:
            raise DataError(f"{part}: column {name} must hold text ({error}).") from error
        chunks += pc.utf8_trim_whitespace(pc.replace_substring(column, "\ufeff", "")).chunks
    return pa.chunked_array(chunks, pa.large_string())


def _columns(spec: str, rows: Rows, wanted: Sequence[str]) -> list[str]:
    """Returns those of the wanted columns that the table has; raises DataError if it has none."""
    names = rows.names
    found = [name for name in wanted if name in names]
    if not found:
        raise DataError(
            f"{_columns_told(spec, rows, wanted)}. Required are {', '.join(PAIR_COLUMNS)} (labelled pairs), or an "
            f"image column ({', '.join(IMAGE_COLUMNS)}) and a caption column ({', '.join(TEXT_COLUMNS)})."
        )
    return found


def _columns_told(spec: str, rows: Rows, wanted: Sequence[str]) -> str:
    """Returns a message with the columns of a table that lacks the wanted ones, naming a part that differs, if any."""
    (first, columns), *others = rows.columns.items()
    lacking = [part for part, held in others if set(columns) & set(wanted) and not set(held) & set(wanted)]
    differing = lacking or [part for part, held in others if set(held) != set(columns)]
    if not differing:
        return f"{spec}: columns found: {', '.join(columns)}"
    held = ", ".join(rows.columns[differing[0]])
    return f"{differing[0]}: its columns differ from those of {first}: {held} instead of {', '.join(columns)}"
