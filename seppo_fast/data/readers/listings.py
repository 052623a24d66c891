"""Reads listings of files and captions, one row per file: metadata.jsonl and metadata.csv, as the datasets library
defines them, and the rows of any csv.

Reasons of problems are part of cache keys (see `Problem`): do not reword them.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from seppo_fast.data.captions import TEXT_COLUMNS, caption_of, checked_caption, encoding_hint
from seppo_fast.data.examples import Problem, Source, counted, printable
from seppo_fast.data.media.video_file import require_av
from seppo_fast.data.names import Names, path_of, relative_name, walk_files
from seppo_fast.data.readers.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Entry, FolderSource
from seppo_fast.utils.errors import DataError

LISTINGS = ("metadata.jsonl", "metadata.csv")
Row = tuple[int, dict[str, Any] | str]
"""The number of a row's (last) line, and its fields or a message about what is wrong with it."""


def find_listing(folder: Path) -> Path | None:
    """Returns a folder's listing, or None; a metadata.csv without a column `file_name` is not a listing."""
    found = (folder / name for name in LISTINGS)
    return next((path for path in found if path.is_file() and is_listing(path)), None)


def is_listing(path: Path) -> bool:
    """Returns whether a file is a listing, judging by the name and a csv's columns; raises DataError."""
    return path.name == LISTINGS[0] or (path.name == LISTINGS[1] and "file_name" in csv_columns(path))


def open_listing(spec: str, listing: Path) -> Source:
    """Opens the images that a listing's rows name, in their order, captioned by the first text under `TEXT_COLUMNS`.

    The source holds clips if most rows name clips. If a file is listed again, each row is an example with its own
    caption, and later ids end in `#<line>`. Files of the same kind that no row names are not used; a note counts them.

    Raises:
        DataError: the listing cannot be read as UTF-8, or is a malformed csv; or it names clips and PyAV is not
            installed.
    """
    folder = listing.parent
    files = _Files(folder)
    entries: list[Entry] = []
    problems: list[Problem] = []
    listed: set[str] = set()
    for number, row in _json_rows(listing) if listing.name == LISTINGS[0] else csv_rows(listing):
        try:
            name, prompt = _file_and_caption(row)
        except ValueError as error:
            problems.append(Problem(f"{listing.name}:{number}", str(error)))
            continue
        file = files.find(name)
        label = row.get("label") if isinstance(row, dict) else None
        entries.append(Entry(f"{name}#{number}" if file in listed else name, file, prompt, label=label))
        listed.add(file)
    clips = 2 * sum(_is(entry.name, VIDEO_SUFFIXES) for entry in entries) > len(entries)
    if clips:
        require_av()
    source = FolderSource(spec, folder, entries, problems, clips)
    unlisted = sum(_is(name, VIDEO_SUFFIXES if clips else IMAGE_SUFFIXES) for name in files.names - listed)
    if unlisted:
        kind, where = "clip" if clips else "image", printable(str(folder))
        unused = counted(unlisted, f"{kind} in {where} is", f"{kind}s in {where} are")
        source.notes.append(f"{unused} not listed in {listing.name} and not used")
    return source


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    return PurePosixPath(name).suffix.lower() in suffixes


class _Files:
    """The files below a folder; `names` are their relative paths, with slashes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.names = {relative_name(path, folder) for path in walk_files(folder)}
        self._spelled: Names[str] = Names()
        for name in sorted(self.names):
            self._spelled.add(name, name)

    def find(self, name: str) -> str:
        """Returns the file's name as spelled on disk, or `name` unchanged if no such file exists."""
        if name in self.names or os.path.lexists(path_of(self._folder, name)):
            return name
        return next(iter(self._spelled.find(name)), name)


def _file_and_caption(row: dict[str, Any] | str) -> tuple[str, str]:
    """Returns (relative file name, caption) of one row; raises ValueError with the reason if it is invalid."""
    if isinstance(row, str):
        raise ValueError(row)
    name, prompt = row.get("file_name"), caption_of(row)
    if not isinstance(name, str) or not name:
        raise ValueError('"file_name" is missing')
    column = next((column for column in TEXT_COLUMNS if row.get(column) is prompt and prompt is not None), "text")
    if not isinstance(prompt, str):
        raise ValueError(f'{name}: "{column}" is {"missing" if prompt is None else "no text"}')
    prompt = checked_caption(f'{name}: "{column}"', prompt)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name!r} points outside the folder")
    return path.as_posix(), prompt


def _json_rows(listing: Path) -> Iterator[Row]:
    """Yields each line that is not blank; raises DataError."""
    try:
        with open(listing, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    yield number, f"not a JSON object ({error})"
                    continue
                yield number, record if isinstance(record, dict) else "not a JSON object"
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(listing, error) from error


def csv_columns(table: Path) -> list[str]:
    """Returns the names in the first row of a csv, without surrounding white space; raises DataError."""
    _, names = next(_csv_lines(table), (0, []))
    return [name.strip() for name in names]


def csv_rows(table: Path) -> Iterator[Row]:
    """Yields each row below the first one, as a mapping from column to field.

    Raises:
        DataError: the csv cannot be read as UTF-8, is malformed, or has two columns of the same name.
    """
    columns = csv_columns(table)
    twice = next((column for column in columns if column and columns.count(column) > 1), "")
    if twice:
        raise DataError(f"{table}: the column {twice} appears twice; rename or remove one.")
    for place, (line, row) in enumerate(_csv_lines(table)):
        if place and len(row) == len(columns):
            yield line, dict(zip(columns, row, strict=True))
        elif place:
            yield line, f"{len(row)} fields in {len(columns)} columns: a caption with a comma needs quotes"


def _csv_lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the last line, fields) for each row that is not empty; raises DataError."""
    whole = 0  # the last line of the previous row
    try:
        # strict: otherwise an unclosed quote would swallow the rest of the file
        with open(table, encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, strict=True)
            for row in rows:
                whole = rows.line_num
                if row:
                    yield whole, row
    except csv.Error as error:
        unclosed = "unexpected end of data" in str(error)
        wrong = f"the row that begins in line {whole + 1} has an unclosed quote"
        raise DataError(f"{table}: {wrong if unclosed else f'line {rows.line_num} is not csv ({error})'}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(table, error) from error


def _unreadable(table: Path, error: OSError | UnicodeDecodeError) -> DataError:
    hint = encoding_hint(error.object, table) if isinstance(error, UnicodeDecodeError) else ""
    return DataError(f"{table}: cannot be read as UTF-8 text ({error}){f'; {hint}' if hint else '.'}")
