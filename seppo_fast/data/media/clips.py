"""Decodes a clip into a few square frames, or raises an `ImageError` with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import BinaryIO

import numpy as np
from PIL import Image

from seppo_fast.data.examples import Example
from seppo_fast.data.media.frames import Choice, keyed_choice
from seppo_fast.data.media.images import ImageError, Opened, fit_square
from seppo_fast.data.media.video_file import VideoFile, require_av


@dataclass(frozen=True)
class Clip:
    """Frames chosen from a clip.

    Attributes:
        pixels: uint8 (F, resolution, resolution, 3).
        size: Display width and height in pixels, before rotation.
        remarks: The kinds of remarks that apply to it, as named in `data.remarks`.
    """

    pixels: np.ndarray
    size: tuple[float, float]
    remarks: tuple[str, ...]


def load_clip(example: Example, name: str, opened: Opened, resolution: int, frames: int, flip: bool = False) -> Clip:
    """Decodes `frames` frames of a clip into squares as `images.fit_square` makes them, and closes it.

    Args:
        example: The example that the clip belongs to; its id selects the window and whether to flip.
        name: The clip's name in error messages.
        opened: The result of the example's `image.open`: a stream of a video file, or uint8 pixels (N, H, W, 3).
        resolution: Side of the result in pixels.
        frames: The number of frames F. They are chosen by number if `opened` is an array or `example.by_number` is set,
            else by time; see `media.frames`.
        flip: Whether to mirror the clips of half of all ids.

    Raises:
        ImageError: the file has zero bytes, is not a video, is truncated or damaged, or has no video stream or frames;
            or its frames differ in size or exceed 64 megapixels.
        DataError: PyAV is not installed.
    """
    by_number = example.by_number or isinstance(opened, np.ndarray)
    choice = Choice(frames, whole=example.time_lapse, by_number=by_number, key=example.id)
    if isinstance(opened, np.ndarray):
        clip = _from_array(name, opened, choice, resolution)
    else:
        with opened:
            clip = _from_file(name, opened, choice, resolution)
    if flip and keyed_choice("flip", example.id, 2):
        return replace(clip, pixels=np.ascontiguousarray(clip.pixels[:, :, ::-1]))
    return clip


def _from_array(name: str, pixels: np.ndarray, choice: Choice, resolution: int) -> Clip:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ImageError(name, f"a clip's pixels must be uint8 (F, H, W, 3), got {pixels.dtype} {pixels.shape}")
    if not len(pixels):
        raise ImageError(name, "no frames")
    times = range(len(pixels))
    places = choice.places(times, Fraction(1))
    squares = {place: fit_square(Image.fromarray(pixels[place]), resolution) for place in set(places)}
    size = float(pixels.shape[2]), float(pixels.shape[1])
    return Clip(np.stack([squares[place] for place in places]), size, choice.remarks(times, Fraction(1), places))


def _from_file(name: str, stream: BinaryIO, choice: Choice, resolution: int) -> Clip:
    require_av()
    import av

    try:
        file = VideoFile(name, stream)
        times = file.packet_times()
        places = choice.places(times, file.unit) if times else []
        squares = _squares_at(file, [times[place] for place in places], resolution) if times else None
        if times is None or squares is None:
            # Packets may be hidden, hold several frames, or lack a time stamp: decode to learn the frames' times.
            times = file.frame_times()
            places = choice.places(times, file.unit)
            squares = _squares_of(file, places, resolution)
        transfer = (file.transfer,) if file.transfer else ()
        return Clip(np.stack(squares), file.size, choice.remarks(times, file.unit, places) + transfer)
    except ImageError:
        raise
    except av.FFmpegError as error:
        raise ImageError(name, f"truncated or damaged ({error.strerror})") from error
    except Exception as error:  # damaged files raise arbitrary exceptions in PyAV
        raise ImageError(name, f"truncated or damaged ({error})") from error


def _squares_at(file: VideoFile, wanted: Sequence[int], resolution: int) -> list[np.ndarray] | None:
    """Returns the frames shown at these times, or None if one is not found or frames are not decoded in time order."""
    squares: dict[int, np.ndarray] = {}
    last = None
    for frame in file.frames():
        if frame.pts is None or (last is not None and frame.pts <= last):
            return None
        last = frame.pts
        if frame.pts in wanted:
            squares[frame.pts] = file.square(frame, resolution)
        if len(squares) == len(set(wanted)):
            return [squares[time] for time in wanted]
    return None


def _squares_of(file: VideoFile, wanted: Sequence[int], resolution: int) -> list[np.ndarray]:
    """Returns the frames with these numbers, counted in display order."""
    numbered = zip(range(max(wanted) + 1), file.frames())
    squares = {number: file.square(frame, resolution) for number, frame in numbered if number in wanted}
    return [squares[number] for number in wanted]
