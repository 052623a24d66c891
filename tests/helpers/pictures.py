"""Writes picture files and the other files of data sets."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pickapic(
    path: Path, labels: list[tuple[float | None, float | None]], captions: list[str | None], **options: int
) -> None:
    """Writes parquet in the Pick-a-Pic v2 schema; the images of row i are jpeg(pixels(2i)) and jpeg(pixels(2i + 1))."""
    table = {
        "jpg_0": [encoded(pixels(2 * i), "JPEG") for i in range(len(labels))],
        "jpg_1": [encoded(pixels(2 * i + 1), "JPEG") for i in range(len(labels))],
        "label_0": pa.array([first for first, _ in labels], pa.float64()),
        "label_1": pa.array([second for _, second in labels], pa.float64()),
        "caption": pa.array(captions, pa.string()),
        "ranking_id": list(range(len(labels))),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path, **options)


def problems_of(source) -> dict[str, str]:
    return {problem.id: problem.reason for problem in source.problems}


def header_only_png(width: int, height: int) -> bytes:
    """Returns a PNG that declares this size but has no pixels, so decoding it always fails."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def write_metadata(folder: Path, lines: list[object]) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


SIDE = 24
PICTURE = pixels(1, SIDE, SIDE)


def png_with(kind: bytes, data: bytes, broken: bool = False) -> bytes:
    """Returns `PICTURE` as a PNG with one more chunk after its header, whose checksum is wrong if `broken`."""
    plain = encoded(PICTURE)
    check = zlib.crc32(kind + data) ^ broken
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
    return plain[:33] + chunk + plain[33:]


def with_wrong_crc(content: bytes, kind: bytes) -> bytes:
    place = content.index(kind) + 4
    size = struct.unpack(">I", content[place - 8 : place - 4])[0]
    return content[: place + size] + b"\0\0\0\0" + content[place + size + 4 :]


def picture(path: Path, seed: int, caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(pixels(seed)))
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
