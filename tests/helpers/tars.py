"""Writes tar shards and lists the problems that a source found in them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from seppo_fast.data.sources import Source
from tests.helpers.pictures import encoded, pixels


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(key: str, seed: int, caption: str | None = None) -> list[tuple[tarfile.TarInfo, bytes]]:
    text = f"caption {seed}" if caption is None else caption
    return [member(f"{key}.png", encoded(pixels(seed))), member(f"{key}.txt", text.encode())]


def refusals(source: Source) -> dict[str, str]:
    return {problem.id: problem.reason for problem in source.problems}
