"""From an image wherever it lies to a square of pixels, and a plain reason when that cannot be done."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from seppo_fast.errors import DataError

MAX_PIXELS = 64_000_000
# Named, so that Pillow never hands a file to a decoder that runs another program (EPS) or that nobody trains on.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CROPS = ("center",)

Opened = BinaryIO | np.ndarray


class ImageError(DataError):
    """One image or clip that cannot be used.

    Attributes:
        name: The file (or file and row) that it is.
        reason: Why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class ImageRef:
    """An image or a clip that is not read yet.

    Attributes:
        name: How an error names it.
        open: Gives a binary stream of an encoded file, or pixels as a uint8 array: (H, W, 3), of a clip
            (F, H, W, 3). May raise OSError or ValueError.
    """

    name: str
    open: Callable[[], Opened]


def file_ref(path: Path) -> ImageRef:
    """An image or a clip in a file of its own."""
    return ImageRef(str(path), lambda: open_file(path))


def open_file(path: Path) -> BinaryIO:
    """A file for reading.

    Raises:
        OSError: it cannot be opened, or is a device or a pipe, which may never end.
        ValueError: no file can have that name.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a device or a pipe", str(path))
    return open(path, "rb")


def bytes_ref(name: str, read: Callable[[], bytes | None]) -> ImageRef:
    """An encoded image inside something larger, such as a table's cell; `read` fetches it when it is wanted."""

    def open_bytes() -> Opened:
        content = read()
        if content is None:
            raise ValueError("the cell holds no image")
        return io.BytesIO(content)

    return ImageRef(name, open_bytes)


def load_image(ref: ImageRef, resolution: int, crop: str = "center") -> np.ndarray:
    """The image as a square: upright, RGB over white, shorter side scaled to `resolution`, the middle cut out.

    Args:
        ref: The image.
        resolution: Side of the result in pixels.
        crop: "center" is all there is.

    Returns:
        uint8 array (resolution, resolution, 3).

    Raises:
        ImageError: missing, empty, truncated, not an image, or larger than 64 megapixels (known before decoding).
        ValueError: `resolution` or `crop` is not allowed.
    """
    check_framing(resolution, crop)
    return fit_square(decode_image(ref.name, open_image(ref)), resolution)


def check_framing(resolution: int, crop: str) -> None:
    """Raises ValueError unless `load_image` knows how to make this square."""
    if resolution < 1:
        raise ValueError(f"resolution must be a positive number of pixels, got {resolution}")
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {', '.join(map(repr, CROPS))}, got {crop!r}")


def open_image(ref: ImageRef) -> Opened:
    """Opens the image without decoding it; raises ImageError."""
    try:
        return ref.open()
    except FileNotFoundError:
        raise ImageError(ref.name, "the file is missing") from None
    except OSError as error:
        raise ImageError(ref.name, f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # pyarrow raises its own kind of ValueError on a damaged page
        raise ImageError(ref.name, str(error)) from error


def decode_image(name: str, opened: Opened, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decodes what `open_image` gave, closes it, and returns it upright in mode RGB; raises ImageError.

    Args:
        name: how an error names it.
        opened: what to decode.
        formats: Pillow's names of those that it may be in.
    """
    if isinstance(opened, np.ndarray):
        if opened.dtype != np.uint8 or opened.ndim != 3 or opened.shape[2] != 3:
            raise ImageError(name, f"pixels must be uint8 (H, W, 3), got {opened.dtype} {opened.shape}")
        return Image.fromarray(opened)
    with opened:
        if not opened.read(1):
            raise ImageError(name, "zero bytes")
        opened.seek(0)
        try:
            return _decode_stream(name, opened, formats)
        except ImageError:
            raise
        except Image.UnidentifiedImageError:
            raise ImageError(name, f"not an image ({', '.join(formats)} are read)") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(name, f"too large: {error}") from None
        except Exception as error:  # a damaged file raises whatever its decoder trips over, SyntaxError included
            raise ImageError(name, f"truncated or damaged ({error})") from error


def _decode_stream(name: str, stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Decodes a stream of at least one byte, after looking at the size in its header."""
    with Image.open(stream, formats=formats) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            megapixels = width * height / 1e6
            raise ImageError(name, f"too large: {width} x {height} is {megapixels:.0f} megapixels, 64 at most")
        image.load()
        return _to_rgb(name, ImageOps.exif_transpose(image))


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha over white, 16-bit gray to its upper byte."""
    if image.mode.startswith("I;16"):
        # convert("RGB") would clip at 255 and turn nearly every such picture white
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ImageError(name, "32-bit pixels have no agreed range; save it as an 8-bit image")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_square(image: Image.Image, resolution: int) -> np.ndarray:
    """The middle square of an RGB image, Lanczos-resampled to (resolution, resolution, 3) uint8.

    Cutting first and scaling that square is the same picture as scaling the shorter side first, and costs nothing
    more for a panorama: a 1 x 60,000,000 image would otherwise be scaled to 512 x 30,720,000,000.
    """
    width, height = image.size
    if (width, height) != (resolution, resolution):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)
