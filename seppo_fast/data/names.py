"""Handles file names across systems: names that hold no data, spellings of one name, and listing a folder's files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Generic, TypeVar

from seppo_fast.utils.errors import DataError

_NO_DATA = {
    "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx", "thumbs.db",
    "desktop.ini",
}  # fmt: skip

T = TypeVar("T")


def holds_no_data(name: str) -> bool:
    """Returns whether a file or folder with this name is hidden, or belongs to an operating system."""
    return name.startswith(".") or name.lower() in _NO_DATA


class Names(Generic[T]):
    """A mapping from file names to values that falls back to another spelling if the exact name does not exist.

    macOS decomposes accented letters in the names it writes (NFD), other systems compose them (NFC), and a listing made
    on Windows separates folders by backslashes.
    """

    def __init__(self) -> None:
        self._exact: dict[str, list[T]] = {}
        self._composed: dict[str, list[T]] = {}

    def add(self, name: str, value: T) -> None:
        """Adds a value under this name, beside those it already has."""
        self._exact.setdefault(name, []).append(value)
        self._composed.setdefault(composed(name), []).append(value)

    def find(self, name: str) -> list[T]:
        """Returns the values under the exact name, else under its NFC form, else with slashes for its backslashes."""
        spelled = self._composed.get(composed(name)) or self._composed.get(composed(slashed(name)))
        return self._exact.get(name) or spelled or []


def relative_name(path: Path, folder: Path) -> str:
    """Returns the path relative to the folder, with slashes, decoded as UTF-8: ids are the same in every locale."""
    return utf8_name(path.relative_to(folder).as_posix())


def utf8_name(name: str) -> str:
    """Decodes a name's bytes as UTF-8, undoing the decoding with the locale's encoding that Python applied."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def path_of(folder: Path, name: str) -> Path:
    """Returns the path below the folder of a name as `utf8_name` gives; an unencodable name is joined unchanged."""
    try:
        return folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # a lone surrogate; opening the file then fails with a message
        return folder / name


def composed(name: str) -> str:
    """Returns the name with its accented letters composed (NFC)."""
    return unicodedata.normalize("NFC", name)


def slashed(name: str) -> str:
    """Returns the name with slashes for backslashes, and without a leading `./`."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def walk_files(folder: Path) -> list[Path]:
    """Returns every file below `folder` that may hold data, sorted by the components of its relative path.

    Symbolic links to folders are followed, each folder once: under its own path if it is below `folder`, else under the
    first link to it. A link to a folder that contains the link is not followed.

    Raises:
        DataError: a folder in it cannot be listed.
    """
    files: list[Path] = []
    known: set[str] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for place in waiting:
            target = os.path.realpath(place)
            around = os.path.realpath(place.parent)
            if target not in known and (place == folder or os.path.commonpath([target, around]) != target):
                for parent, folders, names in _walk(place, known):
                    links += [parent / name for name in folders if (parent / name).is_symlink()]
                    files += [parent / name for name in names]
        waiting = sorted(links, key=lambda path: path.relative_to(folder).parts)
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def _walk(place: Path, known: set[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walks like `os.walk`, skipping names without data and folders whose real path is in `known`, which it extends."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: this folder cannot be listed ({error.strerror}).") from error

    for parent, folders, names in os.walk(place, onerror=refuse):
        real = os.path.realpath(parent)
        if real in known:
            folders.clear()
            continue
        known.add(real)
        # macOS leaves ._x.png beside x.png: the same suffix, but not an image
        folders[:] = [name for name in folders if not holds_no_data(name)]
        yield Path(parent), folders, [name for name in names if not holds_no_data(name)]
