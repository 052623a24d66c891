"""A read-only stream composed of parts of another stream."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, BinaryIO


class _Parts(io.RawIOBase):
    def __init__(self, stream: BinaryIO, parts: Sequence[tuple[int, int]]) -> None:
        self._stream, self._parts = stream, parts
        self._ends = list(accumulate(length for _, length in parts))
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1] if self._ends else 0}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        part = bisect_right(self._ends, self._place)
        if part == len(self._parts):
            return 0
        begin, _ = self._parts[part]
        left = self._ends[part] - self._place
        self._stream.seek(begin + self._parts[part][1] - left)
        content = self._stream.read(min(left, len(buffer)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def parts_of(stream: BinaryIO, parts: Sequence[tuple[int, int]]) -> BinaryIO:
    """Returns a stream of the concatenated parts, each (offset, length); reading it moves the position of `stream`."""
    if parts == [(0, stream.seek(0, io.SEEK_END))]:
        stream.seek(0)
        return stream
    return io.BufferedReader(_Parts(stream, parts))


def append_part(parts: list[tuple[int, int]], place: int, length: int) -> None:
    """Appends a part, or extends the last part if the new one directly follows it."""
    begin, before = parts[-1] if parts else (place, 0)
    parts[-1:] = [(begin, before + length)] if begin + before == place else [*parts[-1:], (place, length)]
