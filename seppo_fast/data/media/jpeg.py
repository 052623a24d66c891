"""Strips optional metadata segments from JPEG files, so that a malformed one does not make the image unreadable."""

from __future__ import annotations

import io
from typing import BinaryIO

from seppo_fast.data.media.parts import append_part, parts_of

SIGNATURE = b"\xff\xd8\xff"
_FILL, _SCAN = 0xFF, 0xDA
_INFORMING = (*range(0xE0, 0xF0), 0xFE)  # APP0 to APP15, and comments
_NEEDED = {
    0xE0: (b"JFIF\0", 14),  # JFIF and Adobe (0xEE) tell the colour space
    0xE1: (b"", 0),  # EXIF and XMP, which may hold the orientation
    0xE2: (b"ICC_PROFILE\0", 14),
    0xEE: (b"Adobe", 12),
}
"""The metadata segments that are kept, by marker: how their content begins, and its minimum length in bytes."""


def stripped(stream: BinaryIO) -> BinaryIO:
    """Returns a JPEG reduced to its pixels and the metadata for their colours and orientation.

    From the start of the pixels, or from a truncated or invalid segment, everything is left to the decoder.
    """
    size = stream.seek(0, io.SEEK_END)
    parts = [(0, 2)]
    place = 2
    while place < size:
        stream.seek(place)
        head = stream.read(32)
        marker = head[1] if head[:1] == b"\xff" and len(head) > 1 else _SCAN
        length = 1 if marker == _FILL else 2 + int.from_bytes(head[2:4], "big")
        if marker <= 0xBF or 0xD0 <= marker <= _SCAN or place + length > size:
            append_part(parts, place, size - place)
            break
        begin, least = _NEEDED.get(marker, (b"", size))
        if marker not in _INFORMING or (head[4:].startswith(begin) and length - 4 >= least):
            append_part(parts, place, length)
        place += length
    return parts_of(stream, parts)
