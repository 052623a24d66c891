"""Reads the headers in a tar file, also of several concatenated archives, without reading any member's content."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 512
_MOST_READ = 1 << 20
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


class _Headers(io.FileIO):
    """A file for tarfile that limits the size of each read, because a damaged header may declare a huge size."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MOST_READ:
            raise tarfile.ReadError(f"damaged: a header of {size} bytes")
        return super().read(size) or b""


def headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yields every member's header, in order, also those behind an end mark, as `tar --ignore-zeros` does.

    Raises:
        OSError: the file cannot be read.
        Exception: the file is not a tar file, is damaged, or is truncated (which tarfile itself would silently treat as
            its end); or data behind an end mark are not an archive.
    """
    with _Headers(path) as file:
        head = file.read(8)
        for magic, tool in _COMPRESSED.items():
            if head.startswith(magic):
                raise tarfile.ReadError(f"compressed: unpack it with {tool}, since images are read where they lie")
        if not head:
            raise tarfile.ReadError("zero bytes")
        count, end = 0, 0
        content: int | None = 0
        while content is not None:
            start, before = content // _BLOCK * _BLOCK, count
            file.seek(start)
            try:
                tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 - it only borrows the file
            except tarfile.ReadError as error:
                raise tarfile.ReadError(f"not a tar file ({error})") from error
            try:
                for header in tar:
                    if header.size < 0 or header.offset < end:
                        raise tarfile.ReadError("members that overlap")
                    count, end = count + 1, header.offset_data
                    yield header
            except tarfile.TarError as error:
                raise tarfile.ReadError(f"truncated or damaged after {count} members ({error})") from error
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                if start == 0 or count > before:
                    raise tarfile.ReadError(f"truncated or damaged after {count} members (no end mark)")
                rest = path.stat().st_size - content
                raise tarfile.ReadError(f"the last {rest} bytes, behind its end mark, are no archive and are not read")
            content = _content(file)


def _content(file: _Headers) -> int | None:
    """Returns the offset of the next byte that is not zero, or None if only zeros follow."""
    while block := file.read(_MOST_READ):
        rest = block.lstrip(b"\0")
        if rest:
            return file.tell() - len(rest)
    return None
