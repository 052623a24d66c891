"""Reads folders of clips, captioned by a text file beside each or by a csv in MagicTime's format.

Reasons of problems are part of cache keys (see `Problem`): do not reword them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from seppo_fast.data.captions import checked_caption
from seppo_fast.data.examples import Problem, Source, counted, printable
from seppo_fast.data.media.video_file import require_av
from seppo_fast.data.names import Names, composed, relative_name, slashed
from seppo_fast.data.readers.folders import VIDEO_SUFFIXES, Entry, FolderSource
from seppo_fast.data.readers.listings import Row, csv_columns, csv_rows
from seppo_fast.data.readers.sidecars import open_sidecars
from seppo_fast.utils.errors import DataError


def open_clip_folder(spec: str, folder: Path, files: Sequence[Path]) -> Source:
    """Opens the clips among `files`, captioned by the only csv among them or, without a csv, by `x.txt` beside `x.mp4`.

    Raises:
        DataError: there are several csv files, the csv cannot be read, or PyAV is not installed.
    """
    tables = [path for path in files if path.suffix.lower() == ".csv"]
    if len(tables) > 1:
        names = ", ".join(printable(relative_name(path, folder)) for path in tables)
        raise DataError(f"{spec}: {len(tables)} csv files ({names}); give the path of the one to use.")
    if tables:
        return open_clip_csv(spec, tables[0], files)
    require_av()
    return open_sidecars(spec, folder, files, clips=True)


def open_clip_csv(spec: str, table: Path, files: Sequence[Path]) -> Source:
    """Opens the clips that a csv's rows name, in their order: `videoid`, `name` (the caption), optional `is_transmit`.

    `videoid` is a clip's file name, with or without its suffix, among those `files` that are in or below the csv's
    folder. If a clip is named again with another caption, the later id ends in `#<line>`. Rows that repeat an earlier
    row's clip and caption, and clips that no row names, are not used; notes count them. A csv with `is_transmit` is
    treated as one of MagicTime's: its clips' frames are chosen by number.

    Raises:
        DataError: the csv cannot be read as UTF-8, is malformed, or lacks a column; or PyAV is not installed.
    """
    require_av()
    folder = table.parent
    clips = _Clips(folder, files)
    entries: list[Entry] = []
    problems: list[Problem] = []
    ids: set[str] = set()
    seen: dict[tuple[str, str], tuple[int, bool]] = {}
    repeated: list[int] = []
    for line, fields in _rows(table):
        place = f"{table.name}:{line}"
        if isinstance(fields, str):
            problems.append(Problem(place, fields))
            continue
        videoid = fields["videoid"].strip()
        try:
            if not videoid:
                raise ValueError("videoid is empty")
            prompt = checked_caption("name, the caption,", fields["name"])
            name, time_lapse = clips.find(videoid), _is_time_lapse(fields.get("is_transmit", ""))
        except ValueError as error:
            problems.append(Problem(videoid or place, str(error)))
            continue
        first, was_time_lapse = seen.setdefault((name, prompt), (line, time_lapse))
        if time_lapse != was_time_lapse:
            problems.append(Problem(place, f"is_transmit is another one than in line {first}, of the same clip"))
            continue
        if line != first:
            repeated.append(line)
            continue
        id = f"{videoid}#{line}" if videoid in ids else videoid
        entry = Entry(id, name, prompt, time_lapse, by_number="is_transmit" in fields)
        entries.append(entry)
        ids.add(entry.id)
    source = FolderSource(spec, folder, entries, problems, clips=True)
    if repeated:
        source.notes.append(
            counted(
                len(repeated),
                f"row of {table.name} repeats an earlier row's clip and caption and is not used: line {repeated[0]}",
                f"rows of {table.name} repeat an earlier row's clip and caption and are not used, the first in line "
                f"{repeated[0]}",
            )
        )
    if clips.unused:
        where = printable(str(folder))
        unused = counted(len(clips.unused), f"clip in {where} is", f"clips in {where} are")
        source.notes.append(f"{unused} not listed in {table.name} and not used")
    return source


def _rows(table: Path) -> Iterator[Row]:
    """Returns `csv_rows` of a table of clips, after checking its columns; raises DataError."""
    columns = csv_columns(table)
    if not {"videoid", "name"} <= set(columns):
        raise DataError(
            f"{table}: columns found: {', '.join(columns) or 'none'}. Required are videoid and name (the caption), "
            "separated by commas; is_transmit is optional."
        )
    return csv_rows(table)


def _is_time_lapse(is_transmit: str) -> bool:
    """Returns whether the column is 0, a time-lapse in one shot; an empty field means no. Raises ValueError."""
    known = {"0": True, "0.0": True, "false": True, "1": False, "1.0": False, "true": False, "": False}
    if is_transmit.strip().lower() not in known:
        raise ValueError(f"is_transmit must be 0 or 1, got {is_transmit!r}")
    return known[is_transmit.strip().lower()]


class _Clips:
    """Finds clips by `videoid`; `unused` holds the relative paths, with slashes, of the clips not found so far."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._clips: Names[str] = Names()
        self._others: Names[str] = Names()
        self._lowered: dict[str, str] = {}
        self.unused: set[str] = set()
        for path in files:
            if not path.is_relative_to(folder):
                continue
            relative = PurePosixPath(relative_name(path, folder))
            bare = relative.with_suffix("")
            clip = path.suffix.lower() in VIDEO_SUFFIXES
            if clip:
                self.unused.add(relative.as_posix())
            for name in {relative.as_posix(), relative.name, bare.as_posix(), bare.name}:
                (self._clips if clip else self._others).add(name, relative.as_posix())
                if clip:
                    self._lowered.setdefault(name.lower(), name)

    def find(self, videoid: str) -> str:
        """Returns the path that `videoid` names; raises ValueError if it names no clip or several."""
        found = self._clips.find(videoid)
        if not found and (others := self._others.find(videoid)):
            raise ValueError(f"{others[-1]} is not a clip: none of {', '.join(VIDEO_SUFFIXES)}")
        if not found:
            alike = self._lowered.get(videoid.lower())
            hint = f"; there is {alike!r}" if alike else ""
            raise ValueError(f"the file is missing: no clip of that name beside the csv or below{hint}")
        whole = [name for name in found if name == videoid or composed(name) == composed(slashed(videoid))]
        if len(found) > 1 and not whole:
            raise ValueError(f"several clips have that name: {', '.join(found)}")
        name = (whole or found)[0]
        self.unused.discard(name)
        return name
