"""Digests of files' contents, by which a cache knows that a picture or a clip is another one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from seppo_fast.data.media.images import is_converted, open_file

_BLOCK = 1 << 20  # at once: every core hashes a file, and whole ones would be gigabytes
_END_BYTES = 1 << 20


def picture_sha256(stream: BinaryIO) -> str:
    """sha256 of an encoded picture, with a mark where its profile changes the pixels.

    So caches made before profiles were followed stay valid for all pictures that are not changed by it.
    """
    sha = hashlib.sha256()
    while block := stream.read(_BLOCK):
        sha.update(block)
    stream.seek(0)
    return f"{sha.hexdigest()} in sRGB" if is_converted(stream) else sha.hexdigest()


def picture_file_sha256(path: Path) -> str:
    """As `picture_sha256`, or what kept the file from being read (a missing file is a bad example later on)."""
    try:
        with open_file(path) as file:
            return picture_sha256(file)
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        return type(error).__name__


def clip_file_sha256(path: Path) -> str:
    """sha256 of a clip's size, first and last MiB, or what kept them from being read.

    At one end lies its table of every frame's size and place. A large clip overwritten by another of the same length
    and ends is not noticed; hashing all of it would read, at every start, as much as encoding does.
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
