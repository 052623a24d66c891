"""From a clip wherever it lies to a few square frames of it, and a plain reason when that cannot be done."""

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
        size: Width and height at which it is shown, in pixels, before it is turned.
        remarks: What is remarkable about it, by the names that `remarks` has for that.
    """

    pixels: np.ndarray
    size: tuple[float, float]
    remarks: tuple[str, ...]


def load_clip(example: Example, name: str, opened: Opened, resolution: int, frames: int, flip: bool = False) -> Clip:
    """Decodes `frames` frames of a clip into squares as `images.fit_square` makes them, and closes it.

    Args:
        example: Whose clip it is; its id decides on the window and on flipping.
        name: How an error names the clip.
        opened: What the example's `image.open` gave: a stream of a video file, or uint8 pixels (N, H, W, 3).
        resolution: Side of the result in pixels.
        frames: How many, F. Pixels, and clips with `example.by_number`, by number; others by time. See `frames`.
        flip: Mirror the clips of half of all ids.

    Raises:
        ImageError: zero bytes, not a video, no video stream, no frames, truncated or damaged, frames of several
            sizes or of more than 64 megapixels.
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
            # A packet need not be one frame (hidden or packed ones), nor tell when that is shown: the decoder says so.
            times = file.frame_times()
            places = choice.places(times, file.unit)
            squares = _squares_of(file, places, resolution)
        transfer = (file.transfer,) if file.transfer else ()
        return Clip(np.stack(squares), file.size, choice.remarks(times, file.unit, places) + transfer)
    except ImageError:
        raise
    except av.FFmpegError as error:
        raise ImageError(name, f"truncated or damaged ({error.strerror})") from error
    except Exception as error:  # a damaged file raises whatever PyAV trips over
        raise ImageError(name, f"truncated or damaged ({error})") from error


def _squares_at(file: VideoFile, wanted: Sequence[int], resolution: int) -> list[np.ndarray] | None:
    """The frames shown at these times; None where there are none, or frames come in another order than their times."""
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
    """The frames of these numbers, by the order in which they are shown."""
    numbered = zip(range(max(wanted) + 1), file.frames())
    squares = {number: file.square(frame, resolution) for number, frame in numbered if number in wanted}
    return [squares[number] for number in wanted]
