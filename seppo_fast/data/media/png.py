"""Strips optional chunks from PNG files, so that a malformed or huge one does not make the image unreadable."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

from seppo_fast.data.media.parts import append_part, parts_of

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE_BYTES = 1 << 24
_MAX_TEXT_BYTES = 1 << 20  # compressed or not; Pillow refuses images with more compressed text
_OF_PIXELS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def stripped(stream: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """Returns a PNG reduced to its pixels and possible orientation metadata (EXIF, XMP), and its ICC profile or None.

    From a truncated or invalid chunk on, everything is left to the decoder, which then refuses the file. At most 1 MiB
    of a text and 16 MiB of a profile are decompressed.
    """
    size = stream.seek(0, io.SEEK_END)
    profile = None
    parts = [(0, len(SIGNATURE))]
    place, pixels = len(SIGNATURE), False
    while place < size:
        stream.seek(place)
        head = stream.read(8)
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (size, b"")
        whole = 12 + length
        if place + whole > size or not kind.isalpha():
            append_part(parts, place, size - place)
            break
        if kind == b"iCCP" and not pixels:
            profile = _profile(_checked(stream, kind, length, MAX_PROFILE_BYTES))
        elif kind[:1].isupper() or kind in _OF_PIXELS or _tells_orientation(stream, kind, length):
            append_part(parts, place, whole)
        pixels = pixels or kind == b"IDAT"
        place += whole
        if kind == b"IEND":
            break
    return parts_of(stream, parts), profile


def _checked(stream: BinaryIO, kind: bytes, length: int, most: int) -> bytes:
    """Returns the content of the chunk whose header was just read, or b"" if it is too long or its checksum fails."""
    if length > most:
        return b""
    content = stream.read(length)
    return content if stream.read(4) == struct.pack(">I", zlib.crc32(kind + content)) else b""


def _tells_orientation(stream: BinaryIO, kind: bytes, length: int) -> bool:
    """Returns whether the chunk whose header was just read may hold an orientation and is safe for Pillow to read."""
    if kind == b"eXIf":
        return bool(_checked(stream, kind, length, MAX_PROFILE_BYTES))
    if kind not in _TEXTS:
        return False
    content = _checked(stream, kind, length, _MAX_TEXT_BYTES)
    keyword, _, rest = content.partition(b"\0")
    if keyword not in (b"XML:com.adobe.xmp", b"Raw profile type exif"):
        return False
    if kind == b"iTXt":
        packed = rest[:2] == b"\1\0"
        return not packed or _unpacked(rest[2:].split(b"\0", 2)[-1], _MAX_TEXT_BYTES) is not None
    return kind == b"tEXt" or (rest[:1] == b"\0" and _unpacked(rest[1:], _MAX_TEXT_BYTES) is not None)


def _profile(content: bytes) -> bytes | None:
    """Returns the profile of an iCCP chunk, which holds a name, a zero, the compression method and compressed data."""
    _, _, rest = content.partition(b"\0")
    return _unpacked(rest[1:], MAX_PROFILE_BYTES) if rest[:1] == b"\0" else None


def _unpacked(content: bytes, most: int) -> bytes | None:
    """Decompresses zlib data; returns None if it is invalid or longer than `most` bytes."""
    unpacker = zlib.decompressobj()
    try:
        plain = unpacker.decompress(content, most)
    except zlib.error:
        return None
    return plain if unpacker.eof else None
