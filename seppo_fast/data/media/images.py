"""Decodes an image into a square of pixels, or raises an `ImageError` with the reason."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from seppo_fast.data.media import jpeg, png
from seppo_fast.data.media.colours import converts, gray_to_srgb, to_srgb
from seppo_fast.utils.errors import DataError

MAX_PIXELS = 64_000_000
# An explicit list, so that Pillow never picks a decoder that runs another program (EPS) or that training never needs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CROPS = ("center",)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that makes an image upright, by EXIF orientation."""

Opened = BinaryIO | np.ndarray


class ImageError(DataError):
    """Raised for one image or clip that cannot be used.

    Attributes:
        name: Its file, or file and row.
        reason: Why it cannot be used, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class ImageRef:
    """A reference to an image or clip that has not been read yet.

    Attributes:
        name: Its name in error messages.
        open: Returns a binary stream of an encoded file, or pixels as a uint8 array: (H, W, 3) for an image,
            (F, H, W, 3) for a clip. May raise OSError or ValueError.
    """

    name: str
    open: Callable[[], Opened]


def file_ref(path: Path) -> ImageRef:
    """Returns a reference to an image or clip that is a file of its own."""
    return ImageRef(str(path), lambda: open_file(path))


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading.

    Raises:
        OSError: it cannot be opened, or is a device or a pipe, which may never end.
        ValueError: the name is invalid for a file.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "a device or a pipe", str(path))
    return open(path, "rb")


def bytes_ref(name: str, read: Callable[[], bytes | None]) -> ImageRef:
    """Returns a reference to an encoded image inside a larger file, such as a table; `read` loads it on demand."""

    def open_bytes() -> Opened:
        content = read()
        if content is None:
            raise ValueError("the cell holds no image")
        return io.BytesIO(content)

    return ImageRef(name, open_bytes)


def load_image(ref: ImageRef, resolution: int, crop: str = "center") -> np.ndarray:
    """Decodes an image into an upright RGB square over white: shorter side scaled to `resolution`, centre-cropped.

    Args:
        ref: The image.
        resolution: Side of the result in pixels.
        crop: Must be "center".

    Returns:
        uint8 array (resolution, resolution, 3).

    Raises:
        ImageError: the file is missing, empty, truncated, not an image, or larger than 64 megapixels (checked before
            decoding).
        ValueError: `resolution` or `crop` is invalid.
    """
    check_framing(resolution, crop)
    return fit_square(decode_image(ref.name, open_image(ref)), resolution)


def check_framing(resolution: int, crop: str) -> None:
    """Raises ValueError unless `load_image` accepts this resolution and crop."""
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
    except ValueError as error:  # pyarrow raises a subclass of ValueError for a damaged page
        raise ImageError(ref.name, str(error)) from error


def decode_image(name: str, opened: Opened, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Decodes the result of `open_image`, closes it, and returns it upright in mode RGB; raises ImageError.

    Args:
        name: the image's name in error messages.
        opened: the stream or pixels to decode.
        formats: the accepted formats, by Pillow's names.
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
            raise ImageError(name, f"not an image (supported: {', '.join(formats)})") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError(name, f"too large: {error}") from None
        except Exception as error:  # damaged files raise arbitrary exceptions, even SyntaxError
            raise ImageError(name, f"truncated or damaged ({error})") from error


def _decode_stream(name: str, stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Decodes a non-empty stream, after checking the image size in its header."""
    with _opened(stream, formats) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            megapixels = width * height / 1e6
            raise ImageError(name, f"too large: {width} x {height} is {megapixels:.0f} megapixels, the limit is 64")
        if image.format == "TIFF":
            _turn_by_orientation_alone(image)
        image.load()
        turn = _TURNS.get(_orientation(image))
        return _to_rgb(name, _mode(image), image if turn is None else image.transpose(turn))


def _opened(stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Opens an image and reads its header, leaving out metadata that might make Pillow refuse the file."""
    head = stream.read(len(png.SIGNATURE))
    stream.seek(0)
    if head.startswith(jpeg.SIGNATURE):
        stream = jpeg.stripped(stream)
    if head != png.SIGNATURE:
        return Image.open(stream, formats=formats)
    stream, profile = png.stripped(stream)
    image = Image.open(stream, formats=formats)
    image.info["icc_profile"] = profile
    return image


def is_converted(stream: BinaryIO) -> bool:
    """Returns whether an embedded profile changes the pixels of an encoded image; reads its headers only."""
    head = stream.read(16)
    if head[8:] in (b"WEBPVP8 ", b"WEBPVP8L"):
        return False
    if head[8:] == b"WEBPVP8X":
        return converts("RGB", _webp_profile(stream))  # Pillow would read the whole file
    stream.seek(0)
    try:
        with _opened(stream, FORMATS) as image:
            return converts(_mode(image), image.info.get("icc_profile"))
    except Exception:  # not an image; decoding reports it later
        return False


def _webp_profile(stream: BinaryIO) -> bytes | None:
    """Returns the profile of an extended WebP, stored as a RIFF chunk, or None if missing or too large."""
    place = stream.seek(12)
    while len(head := stream.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"ICCP":
            return stream.read(length) if length <= png.MAX_PROFILE_BYTES else None
        place = stream.seek(place + 8 + length + length % 2)
    return None


def _orientation(image: Image.Image) -> Any:
    """Returns the orientation (1 to 8) from EXIF, else from XMP; None or an invalid value if neither is valid."""
    try:
        told = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # malformed EXIF raises arbitrary exceptions in Pillow
        told = None
    if told is None:
        xmp = image.info.get("xmp")
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None
        told = int(match[1]) if match else None
    return told


def _turn_by_orientation_alone(image: Image.Image) -> None:
    """Hides all tags but the orientation from Pillow, which rotates a TIFF while loading and may fail on other tags."""
    exif = Image.Exif()
    if (orientation := _orientation(image)) in _TURNS:
        exif[ExifTags.Base.Orientation] = orientation
    image.info.pop("xmp", None)
    image.getexif = lambda: exif  # type: ignore[method-assign]


def _mode(image: Image.Image) -> str:
    """Returns Pillow's mode, corrected for 16-bit gray PNG, which Pillow before 11 calls 32-bit ("I")."""
    return "I;16" if image.mode == "I" and image.format == "PNG" else image.mode


def _to_rgb(name: str, mode: str, image: Image.Image) -> Image.Image:
    """Converts any mode to RGB and applies an embedded profile: alpha goes over white, 16-bit gray becomes 8-bit."""
    profile = image.info.get("icc_profile")
    if mode.startswith("I;16"):
        # convert("RGB") would clip at 255 and turn nearly every such image white
        image = Image.fromarray(gray_to_srgb(np.asarray(image).astype(np.uint16), profile))
        profile = None
    if image.mode in ("I", "F"):
        raise ImageError(name, "32-bit pixels have no agreed range; save it as an 8-bit image")
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    image = to_srgb(image, profile)
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        white.alpha_composite(image)
        image = white
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_square(image: Image.Image, resolution: int, aspect: Fraction | int = 1) -> np.ndarray:
    """Returns the centre square of an RGB image, Lanczos-resampled to (resolution, resolution, 3) uint8.

    Cropping first and then scaling gives the same result as scaling the shorter side first, at no extra cost for a
    panorama: a 1 x 60,000,000 image would otherwise be scaled to 512 x 30,720,000,000. The same applies to non-square
    pixels, which are displayed `aspect` times as wide as high.
    """
    width, height = image.size
    if (width, height, aspect) != (resolution, resolution, 1):
        wide, high = float(min(width, height / aspect)), float(min(height, width * aspect))
        left, top = (width - wide) / 2, (height - high) / 2
        box = (left, top, left + wide, top + high)
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)
