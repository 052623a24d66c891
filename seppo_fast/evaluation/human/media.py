"""Copies a study's media under random names, all encoded alike and without metadata."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from seppo_fast.data.media.images import MAX_PIXELS, ImageError, decode_image, file_ref, open_file, open_image
from seppo_fast.evaluation.human.plan import Shown
from seppo_fast.evaluation.media.files import FRAME_MILLISECONDS, decode_media, is_marked, marked_frames
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.progress import progress
from seppo_fast.utils.random import keyed_rng

_NOISE = 0.8  # share of noise in an attention check; the picture is hardly visible
_LOSSLESS_SIDE = 256  # clips up to this side stay lossless; larger ones would be too much to send to raters
_MOST_SIDE = 16383  # WebP's limit


@dataclass(frozen=True)
class Sheet:
    """How a medium is stored: the frames of a clip are tiles of one picture, row by row.

    A page can show two such clips in step, which it cannot for animated pictures.

    Attributes:
        file: the file's name.
        width: a frame's width in pixels.
        height: a frame's height in pixels.
        frames: the number of frames; 1 for a picture.
        columns: tiles per row.
        rows: rows of tiles.
        milliseconds: the time that each frame is shown.
    """

    file: str
    width: int
    height: int
    frames: int
    columns: int
    rows: int
    milliseconds: int


def copy_media(files: Mapping[Shown, Path], folder: Path, seed: int, secret: str) -> dict[Shown, Sheet]:
    """Writes every medium into `folder` and returns where; files are written in the order of their random names.

    So neither names nor modification times nor the order in the folder tell the models apart.

    Args:
        files: the source files, PNG or (animated) WebP.
        folder: an existing, empty folder.
        seed: the study's seed.
        secret: the digest of `items.json`.

    Raises:
        ImageError: a file is damaged or too large.
        DataError: the media of an item differ in size or number of frames, which would tell models apart.
        OSError: a file cannot be written.
    """
    named = {shown: _name(shown, seed, secret) for shown in files}
    assert len(set(named.values())) == len(named)
    sheets: dict[Shown, Sheet] = {}
    with progress(len(files), "copied", "media") as advance:
        for shown in sorted(files, key=named.__getitem__):
            sheets[shown] = _copy(files[shown], shown, folder / named[shown], seed)
            advance(1)
    _refuse_different(sheets)
    return sheets


def _name(shown: Shown, seed: int, secret: str) -> str:
    digest = hashlib.blake2b(repr((secret, seed, shown)).encode(), digest_size=8).digest()
    return f"{int.from_bytes(digest, 'little'):020d}"


def _copy(source: Path, shown: Shown, target: Path, seed: int) -> Sheet:
    clip = source.suffix == ".webp"
    frames, milliseconds = _read_clip(source) if clip else (_read_picture(source), FRAME_MILLISECONDS)
    if shown.noise:
        frames = _noisy(frames, seed, shown)
    count, height, width = frames.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    if max(columns * width, rows * height) > _MOST_SIDE:
        raise ImageError(str(source), f"{count} frames of {width} x {height} are too large for one page")
    tiles = np.zeros((rows * columns, height, width, 3), np.uint8)
    tiles[:count] = frames
    sheet = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    # A new image has no metadata to copy.
    image, file = Image.fromarray(np.ascontiguousarray(sheet)), target.with_suffix(".webp" if clip else ".png")
    if clip:
        image.save(file, "WEBP", lossless=max(height, width) <= _LOSSLESS_SIDE, quality=95, method=4)
    else:
        image.save(file, "PNG")
    return Sheet(file.name, width, height, count, columns, rows, milliseconds)


def _read_picture(file: Path) -> np.ndarray:
    """Returns a picture as `(1, H, W, 3)` uint8."""
    return np.asarray(decode_image(str(file), open_image(file_ref(file)), formats=("PNG",)))[None]


def _read_clip(file: Path) -> tuple[np.ndarray, int]:
    """Returns a clip's frames `(F, H, W, 3)` uint8, and the milliseconds of the first; raises ImageError."""
    try:
        with open_file(file) as stream, Image.open(stream, formats=("WEBP",)) as image:
            marked = is_marked(image)  # then equal frames are merged, and the number of frames is in the mark
            count = marked_frames(image) if marked else getattr(image, "n_frames", 1)
            if image.width * image.height * count > MAX_PIXELS:
                raise ImageError(str(file), f"too large: {count} frames of {image.width} x {image.height}")
            if marked:
                return decode_media(file.read_bytes(), str(file)), FRAME_MILLISECONDS
            frames = []
            for number in range(count):
                image.seek(number)
                frames.append(np.asarray(image.convert("RGB")))
                if not number:
                    milliseconds = int(image.info.get("duration") or FRAME_MILLISECONDS)
            return np.stack(frames), milliseconds
    except ImageError:
        raise
    except Exception as problem:  # damaged files raise arbitrary exceptions in Pillow
        raise ImageError(str(file), f"truncated or damaged ({problem})") from problem


def _noisy(frames: np.ndarray, seed: int, shown: Shown) -> np.ndarray:
    """Blends heavy uniform noise over each frame."""
    noise = keyed_rng(seed, f"human noise {shown}").integers(0, 256, frames.shape)
    return ((1 - _NOISE) * frames + _NOISE * noise).round().astype(np.uint8)


def _refuse_different(sheets: Mapping[Shown, Sheet]) -> None:
    first: dict[str, tuple[str, Sheet]] = {}
    for shown, sheet in sheets.items():
        model, other = first.setdefault(shown.item, (shown.model, sheet))
        sizes = [(sheet.frames, sheet.height, sheet.width) for sheet in (other, sheet)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"item {shown.item!r}: {model} and {shown.model} have different shapes (frames, height, width), "
                f"{sizes[0]} and {sizes[1]}; raters would recognize the models by them"
            )
