"""Manifests: of each file in a folder its size and checksum, so that damage is found before anything is used."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRow:
    """What a manifest says of a file.

    Attributes:
        size: in bytes.
        sha256: in hex.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileRow:
        """Returns the row of a file as it is."""
        return cls(file.stat().st_size, digest(file))

    @classmethod
    def read(cls, row: Any) -> FileRow:
        """Returns the row that a manifest holds; raises KeyError, TypeError or ValueError where it is none."""
        return cls(int(row["size"]), str(row["sha256"]))

    def to_json(self) -> dict[str, Any]:
        """Returns what `read` reads."""
        return asdict(self)

    def damage(self, folder: Path, name: str) -> str | None:
        """Returns what is wrong with a file of a folder; None where it is the one that was written.

        Args:
            folder: that holds it.
            name: as the manifest has it; one that leads out of the folder is never read.
        """
        file = folder / name
        try:
            if not file.resolve().is_relative_to(folder.resolve()):
                return "leads out of the folder"
            if not file.is_file():
                return "is missing"
            if file.stat().st_size != self.size:
                return f"has {file.stat().st_size} bytes, {self.size} were written"
            return None if digest(file) == self.sha256 else "is damaged: its checksum differs"
        except OSError as problem:
            return f"cannot be read: {problem}"


def digest(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    sha = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**24):
            sha.update(block)
    return sha.hexdigest()
