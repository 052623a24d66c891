"""From an image wherever it lies to a square of pixels, and a plain reason when that cannot be done."""

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
# Named, so that Pillow never hands a file to a decoder that runs another program (EPS) or that nobody trains on.
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
"""What shows an image upright, by EXIF's orientation."""

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
    with _opened(stream, formats) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            megapixels = width * height / 1e6
            raise ImageError(name, f"too large: {width} x {height} is {megapixels:.0f} megapixels, 64 at most")
        if image.format == "TIFF":
            _turn_by_orientation_alone(image)
        image.load()
        turn = _TURNS.get(_orientation(image))
        return _to_rgb(name, _mode(image), image if turn is None else image.transpose(turn))


def _opened(stream: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """The image with its header read, and without what stands beside its pixels, of which Pillow refuses some."""
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
    """Whether an embedded profile changes the pixels of an encoded image; reads no more of it than its headers."""
    head = stream.read(16)
    if head[8:] in (b"WEBPVP8 ", b"WEBPVP8L"):
        return False
    if head[8:] == b"WEBPVP8X":
        return converts("RGB", _webp_profile(stream))  # Pillow would read all of it
    stream.seek(0)
    try:
        with _opened(stream, FORMATS) as image:
            return converts(_mode(image), image.info.get("icc_profile"))
    except Exception:  # no image, as will be told when it is decoded
        return False


def _webp_profile(stream: BinaryIO) -> bytes | None:
    """The profile of an extended WebP, which is one chunk of a RIFF file; None where it has none."""
    place = stream.seek(12)
    while len(head := stream.read(8)) == 8:
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"ICCP":
            return stream.read(length) if length <= png.MAX_PROFILE_BYTES else None
        place = stream.seek(place + 8 + length + length % 2)
    return None


def _orientation(image: Image.Image) -> Any:
    """1 to 8, as EXIF tells it, else XMP; None, or anything else, where they do not."""
    try:
        told = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # no EXIF; whatever Pillow trips over in it
        told = None
    if told is None:
        xmp = image.info.get("xmp")
        match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp) if isinstance(xmp, bytes) else None
        told = int(match[1]) if match else None
    return told


def _turn_by_orientation_alone(image: Image.Image) -> None:
    """Keeps Pillow, which turns a TIFF as it loads it, from reading tags for that which nobody needs."""
    exif = Image.Exif()
    if (orientation := _orientation(image)) in _TURNS:
        exif[ExifTags.Base.Orientation] = orientation
    image.info.pop("xmp", None)
    image.getexif = lambda: exif  # type: ignore[method-assign]


def _mode(image: Image.Image) -> str:
    """Pillow's mode, of 16-bit gray one that says so: PNG holds no 32 bits, but Pillow before 11 calls them that."""
    return "I;16" if image.mode == "I" and image.format == "PNG" else image.mode


def _to_rgb(name: str, mode: str, image: Image.Image) -> Image.Image:
    """Any mode to RGB, colours as an embedded profile declares them: alpha over white, 16-bit gray to 8 bits."""
    profile = image.info.get("icc_profile")
    if mode.startswith("I;16"):
        # convert("RGB") would clip at 255 and turn nearly every such picture white
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
    """The middle square of an RGB image, Lanczos-resampled to (resolution, resolution, 3) uint8.

    Cutting first and scaling that square is the same picture as scaling the shorter side first, and costs nothing
    more for a panorama: a 1 x 60,000,000 image would otherwise be scaled to 512 x 30,720,000,000. So is a square of
    pixels that are shown `aspect` times as wide as high.
    """
    width, height = image.size
    if (width, height, aspect) != (resolution, resolution, 1):
        wide, high = float(min(width, height / aspect)), float(min(height, width * aspect))
        left, top = (width - wide) / 2, (height - high) / 2
        box = (left, top, left + wide, top + high)
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image)
