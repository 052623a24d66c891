"""The names of files as systems write them: which hold no data, which are one name spelled in two ways, which files lie
below a folder."""

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
    """Whether a file or folder of this name is hidden, or is kept there by a system for its own use."""
    return name.startswith(".") or name.lower() in _NO_DATA


class Names(Generic[T]):
    """Values by the names of files, found by another spelling of a name where that very name does not exist.

    macOS decomposes accented letters in the names it writes (NFD), other systems compose them (NFC), and a listing made
    on Windows separates folders by backslashes.
    """

    def __init__(self) -> None:
        self._exact: dict[str, list[T]] = {}
        self._composed: dict[str, list[T]] = {}

    def add(self, name: str, value: T) -> None:
        """Adds one more value under this name."""
        self._exact.setdefault(name, []).append(value)
        self._composed.setdefault(composed(name), []).append(value)

    def find(self, name: str) -> list[T]:
        """The values under the very name, else under the same letters, else with its backslashes as slashes."""
        spelled = self._composed.get(composed(name)) or self._composed.get(composed(slashed(name)))
        return self._exact.get(name) or spelled or []


def relative_name(path: Path, folder: Path) -> str:
    """The path below the folder with slashes, its bytes taken for UTF-8 in every locale: an id is the same in all."""
    return utf8_name(path.relative_to(folder).as_posix())


def utf8_name(name: str) -> str:
    """A name as the disk gave it, whose bytes Python took for the locale's encoding, with them taken for UTF-8."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def path_of(folder: Path, name: str) -> Path:
    """The file below the folder that has such a name; as it is where no file can have it."""
    try:
        return folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # half a character; opening it says so
        return folder / name


def composed(name: str) -> str:
    """The name with its accented letters composed (NFC)."""
    return unicodedata.normalize("NFC", name)


def slashed(name: str) -> str:
    """The name with slashes for backslashes, and no `./` before it."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def walk_files(folder: Path) -> list[Path]:
    """Every file below `folder` that may hold data, sorted by its path with slashes.

    Linked folders are followed, each folder once: under its own path where it lies below `folder`, else under the first
    link to it. A link to a folder around itself is not followed.

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
    """As `os.walk`, without what holds no data, and without folders whose real path is `known`; adds to those."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: this folder cannot be listed ({error.strerror}).") from error

    for parent, folders, names in os.walk(place, onerror=refuse):
        real = os.path.realpath(parent)
        if real in known:
            folders.clear()
            continue
        known.add(real)
        # macOS leaves ._x.png beside x.png: same suffix, no image
        folders[:] = [name for name in folders if not holds_no_data(name)]
        yield Path(parent), folders, [name for name in names if not holds_no_data(name)]
