"""Digests of files' contents, which let a cache's key change when an image or clip changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from seppo_fast.data.media.images import is_converted, open_file

_BLOCK = 1 << 20  # bytes per read: every core hashes a file, and reading whole files would take gigabytes of memory
_END_BYTES = 1 << 20


def picture_sha256(stream: BinaryIO) -> str:
    """Returns the sha256 of an encoded image, with a suffix if its colour profile changes the pixels.

    Caches from before profiles were applied thereby stay valid for images that no profile changes.
    """
    sha = hashlib.sha256()
    while block := stream.read(_BLOCK):
        sha.update(block)
    stream.seek(0)
    return f"{sha.hexdigest()} in sRGB" if is_converted(stream) else sha.hexdigest()


def picture_file_sha256(path: Path) -> str:
    """Returns `picture_sha256` of a file, or the exception's name if it cannot be read (decoding reports it later)."""
    try:
        with open_file(path) as file:
            return picture_sha256(file)
    except (OSError, ValueError) as error:  # ValueError: the name is invalid for a file
        return type(error).__name__


def clip_file_sha256(path: Path) -> str:
    """Returns the sha256 of a clip's size, first and last MiB, or the exception's name if they cannot be read.

    One of these ends holds the table of every frame's size and offset. Overwriting a large clip with another of the
    same length and the same ends goes unnoticed; hashing all of it would read as much as encoding, at every start.
    """
    try:
        with open_file(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            sha = hashlib.sha256(f"{size} ".encode() + file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            sha.update(file.read(_END_BYTES))
    except (OSError, ValueError) as error:
        return type(error).__name__
    return sha.hexdigest()
