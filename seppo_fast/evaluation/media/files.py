"""The files of generated pictures and clips: PNG, and lossless WebP."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from seppo_fast.utils.errors import DataError

FRAME_MILLISECONDS = 125
CLIP_MARK = b"seppo_fast frames="  # before the number of frames, in a clip's metadata


def encode_media(picture: np.ndarray) -> bytes:
    """Returns a picture `(H, W, 3)` uint8 as PNG, or a clip `(F, H, W, 3)` as lossless animated WebP."""
    content = io.BytesIO()
    if picture.ndim == 3:
        Image.fromarray(picture).save(content, "PNG")
        return content.getvalue()
    first, *others = (Image.fromarray(frame) for frame in picture)
    # The encoder merges equal frames into one that is shown for longer; if all are equal, it writes a still picture.
    first.save(
        content,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=FRAME_MILLISECONDS,
        loop=0,
        lossless=True,
        xmp=b"%s%d" % (CLIP_MARK, len(picture)),
    )
    return content.getvalue()


def decode_media(content: bytes, name: str) -> np.ndarray:
    """Returns the pixels that `encode_media` was given.

    Args:
        content: the file's content.
        name: its name in error messages.

    Raises:
        DataError: it is truncated, damaged, or another kind of file.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as opened:
            if opened.format == "PNG":
                _check_png(content)
                return np.array(opened.convert("RGB"))
            total = marked_frames(opened)
            frames: list[np.ndarray] = []
            for frame in ImageSequence.Iterator(opened):
                pixels = np.array(frame.convert("RGB"))
                ends = (opened.info["timestamp"] + opened.info["duration"]) / FRAME_MILLISECONDS
                frames += [pixels] * ((total if getattr(opened, "n_frames", 1) == 1 else round(ends)) - len(frames))
            if len(frames) != total:
                raise ValueError(f"it has {len(frames)} frames instead of {total}")
            return np.stack(frames)
    except (OSError, ValueError, KeyError, SyntaxError, EOFError) as problem:
        raise DataError(f"{name}: not an intact picture or clip ({problem}); remove it and generate again") from problem


def is_marked(opened: Image.Image) -> bool:
    """Returns whether a WebP file was written by `encode_media`, which states the number of frames."""
    xmp = opened.info.get("xmp")
    return isinstance(xmp, bytes) and xmp.startswith(CLIP_MARK)


def marked_frames(opened: Image.Image) -> int:
    """Returns the number of frames that `encode_media` was given; raises ValueError or KeyError without it."""
    return int(opened.info["xmp"].removeprefix(CLIP_MARK))


def is_intact(file: Path) -> bool:
    """Returns whether a file exists and is undamaged: a PNG by its checksums, a clip by decoding it."""
    try:
        content = file.read_bytes()
        if file.suffix == ".png":
            _check_png(content)
        else:
            decode_media(content, file.name)
    except (OSError, SyntaxError, ValueError, DataError):
        return False
    return True


def _check_png(content: bytes) -> None:
    """Raises OSError or SyntaxError unless the checksums of a PNG are right; cheaper than decoding it."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
        opened.verify()
