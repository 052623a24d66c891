"""Reads images or clips with a caption file beside each, and points out other places that may hold captions.

Reasons of problems are part of cache keys (see `Problem`): do not reword them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from seppo_fast.data.captions import MAX_CAPTION_BYTES, CaptionError, decoded_caption
from seppo_fast.data.examples import Problem, Source, counted, printable
from seppo_fast.data.media.images import open_file
from seppo_fast.data.names import Names, relative_name, utf8_name
from seppo_fast.data.readers.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Entry, FolderSource
from seppo_fast.data.readers.listings import LISTINGS

OTHER_IMAGES = (
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".svg", ".tif", ".tiff",
)  # fmt: skip
OTHER_VIDEOS = (".3gp", ".flv", ".gif", ".m2ts", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".wmv")
_OTHER_CAPTIONS = (".cap", ".caption", ".captions", ".json", ".md", ".prompt", ".text")


def open_sidecars(spec: str, folder: Path, files: Sequence[Path], clips: bool = False) -> Source:
    """Opens the images (or clips) `x.png` among `files`, captioned by `x.txt`; one without the other is a problem."""
    suffixes = VIDEO_SUFFIXES if clips else IMAGE_SUFFIXES
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    spare: Names[Path] = Names()
    for stem in sorted(captions.keys() - {path.with_suffix("") for path in pictures}):
        spare.add(relative_name(stem, folder), stem)
    entries: list[Entry] = []
    problems: list[Problem] = []
    used: set[Path] = set()
    bare: list[Path] = []
    for path in pictures:
        name = relative_name(path, folder)
        stem = path.with_suffix("")
        found = [stem] if stem in captions else spare.find(relative_name(stem, folder))
        if not found:
            problems.append(Problem(name, f"no caption: {utf8_name(stem.name)}.txt is missing"))
            bare.append(path)
            continue
        used.add(found[0])
        try:
            entries.append(Entry(name, name, _read_caption(captions[found[0]])))
        except CaptionError as error:
            problems.append(Problem(name, str(error), error.hint))
    others = {
        path.with_suffix(""): utf8_name(path.name) for path in files if path.suffix.lower() not in (*suffixes, ".txt")
    }
    for stem, path in captions.items():
        if stem not in used:
            reason = f"a caption without {'a clip' if clips else 'an image'}"
            if stem in others:
                reason += f": {others[stem]} is none of {', '.join(suffixes)}"
            problems.append(Problem(relative_name(path, folder), reason))
    source = FolderSource(spec, folder, entries, problems, clips)
    left_out = [path for path in files if path.with_suffix("") not in captions]
    source.notes += other_kinds(folder, left_out, clips)
    source.notes += _elsewhere(folder, files, bare)
    return source


def other_kinds(folder: Path, files: Sequence[Path], clips: bool) -> Iterator[str]:
    """Yields a note if some files are images (or clips) in an unsupported format, judging by their suffixes."""
    known = OTHER_VIDEOS if clips else OTHER_IMAGES
    found = [path for path in files if path.suffix.lower() in known]
    if found:
        counts = Counter(path.suffix.lower() for path in found)
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common())
        first = printable(relative_name(found[0], folder))
        kind = "clip" if clips else "image"
        formats = f"{kind} has an unsupported format and is", f"{kind}s have unsupported formats and are"
        yield (
            f"{counted(len(found), *formats)} not used: {kinds}; the first is {first}. To use such files, convert them "
            f"to {'mp4' if clips else 'png, jpg or webp'}"
        )


def _elsewhere(folder: Path, files: Sequence[Path], bare: Sequence[Path]) -> Iterator[str]:
    """Yields notes on where the captions of the files without one (`bare`) may be instead."""

    def shown(path: Path) -> str:
        return printable(relative_name(path, folder))

    for path in (path for path in files if bare and path.suffix.lower() in (".csv", ".jsonl")):
        if path.name in LISTINGS and path.parent != folder:
            where = printable(str(path.parent))
            yield (
                f"{shown(path)} is not read: it lists files below its own folder. To use it, set data.source to {where}"
            )
        elif path.parent == folder:
            yield (
                f"{shown(path)} is not read: a listing of files must be named {' or '.join(LISTINGS)} and have "
                "file_name and text in each row"
            )
    # For x.png these are x.caption and x.png.caption.
    beside = {path.with_suffix(""): path for path in files if path.suffix.lower() in _OTHER_CAPTIONS}
    found = [beside[key] for path in bare for key in (path.with_suffix(""), path) if key in beside]
    for suffix, count in Counter(path.suffix for path in found).most_common():
        first = next(path for path in found if path.suffix == suffix)
        words = "file without a caption has", "files without a caption have"
        yield (
            f"{counted(count, *words)} a {suffix} file beside {'it' if count == 1 else 'them'}, the first is "
            f"{shown(first)}; captions are read from .txt files only: rename or convert those that hold one"
        )


def _read_caption(path: Path) -> str:
    """Returns the caption file's text, stripped; raises CaptionError."""
    try:
        with open_file(path) as file:
            content = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise CaptionError(f"{utf8_name(path.name)} cannot be read ({error.strerror})") from error
    return decoded_caption(utf8_name(path.name), content, path)
