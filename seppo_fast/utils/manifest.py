"""Manifests: the size and checksum of each file in a folder, so that damage is found before any file is used."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRow:
    """A manifest's entry for one file.

    Attributes:
        size: the size in bytes.
        sha256: the checksum in hex.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileRow:
        """Returns the row that describes a file's present content."""
        return cls(file.stat().st_size, digest(file))

    @classmethod
    def read(cls, row: Any) -> FileRow:
        """Parses a row of a manifest; raises KeyError, TypeError or ValueError if it is malformed."""
        return cls(int(row["size"]), str(row["sha256"]))

    def to_json(self) -> dict[str, Any]:
        """Returns the row as `read` accepts it."""
        return asdict(self)

    def damage(self, folder: Path, name: str) -> str | None:
        """Returns what is wrong with a file, or None if it is intact.

        Args:
            folder: the folder with the manifest.
            name: the file's path in `folder`, as in the manifest; a file outside the folder is never read.
        """
        file = folder / name
        try:
            if not file.resolve().is_relative_to(folder.resolve()):
                return "resolves to a path outside the folder"
            if not file.is_file():
                return "is missing"
            if file.stat().st_size != self.size:
                return f"has {file.stat().st_size} bytes instead of {self.size}"
            return None if digest(file) == self.sha256 else "is damaged: its checksum differs"
        except OSError as problem:
            return f"cannot be read: {problem}"


def digest(file: Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            sha.update(block)
    return sha.hexdigest()
