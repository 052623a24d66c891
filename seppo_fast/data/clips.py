"""From a clip wherever it lies to a few square frames of it, and a plain reason when that cannot be done."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from seppo_fast.data.examples import Example
from seppo_fast.data.images import MAX_PIXELS, ImageError, Opened, fit_square
from seppo_fast.errors import DataError

if TYPE_CHECKING:
    import av

STRIDE = 4
"""Frames of the file from one frame of a window to the next (the paper's setting for AnimateDiff)."""


@dataclass(frozen=True)
class Clip:
    """Frames chosen from a clip.

    Attributes:
        pixels: uint8 (F, resolution, resolution, 3).
        length: How many frames the whole clip has; with fewer than F, some of `pixels` repeat.
    """

    pixels: np.ndarray
    length: int


@dataclass(frozen=True)
class ShortClips:
    """The ids of clips that are too short for frames at `STRIDE`, as `choose_frames` takes them.

    Attributes:
        repeating: fewer frames than are asked for.
        closer: enough of them, but taken from closer together. Of a time-lapse that is nothing to tell.
    """

    repeating: set[str] = field(default_factory=set)
    closer: set[str] = field(default_factory=set)

    def see(self, example: Example, length: int, frames: int) -> None:
        """Takes note of a clip of `length` frames, of which `frames` are chosen."""
        if length < frames:
            self.repeating.add(example.id)
        elif length <= STRIDE * (frames - 1) and not example.time_lapse:
            self.closer.add(example.id)


def short_lines(repeating: int, closer: int, clips: int, frames: int) -> list[str]:
    """What a user is told of short clips, of which there are so many among `clips`."""
    lines = []
    if repeating:
        lines.append(f"{repeating} of {clips} clips have fewer than {frames} frames and repeat some")
    if closer:
        lines.append(
            f"{closer} of {clips} clips are too short for {frames} frames with a stride of {STRIDE} "
            f"({STRIDE * (frames - 1) + 1} frames) and take a smaller one"
        )
    return lines


def load_clip(example: Example, name: str, opened: Opened, resolution: int, frames: int, flip: bool = False) -> Clip:
    """Decodes `frames` frames of a clip into squares as `images.fit_square` makes them, and closes it.

    Args:
        example: Whose clip it is; its id decides on the window and on flipping.
        name: How an error names the clip.
        opened: What the example's `image.open` gave: a stream of a video file, or uint8 pixels (N, H, W, 3).
        resolution: Side of the result in pixels.
        frames: How many, F; see `choose_frames`.
        flip: Mirror the clips of half of all ids.

    Raises:
        ImageError: zero bytes, not a video, no video stream, no frames, truncated or damaged, frames of several
            sizes or of more than 64 megapixels.
        DataError: PyAV is not installed.
    """

    def choose(length: int) -> list[int]:
        return choose_frames(length, frames, whole=example.time_lapse, key=example.id)

    if isinstance(opened, np.ndarray):
        squares, length = _from_array(name, opened, choose, resolution)
    else:
        with opened:
            squares, length = _from_file(name, opened, choose, resolution)
    pixels = np.stack([squares[index] for index in choose(length)])
    if flip and keyed_choice("flip", example.id, 2):
        pixels = np.ascontiguousarray(pixels[:, :, ::-1])
    return Clip(pixels, length)


def choose_frames(length: int, frames: int, *, whole: bool, key: str) -> list[int]:
    """Dynamic frame extraction: which `frames` of a clip's `length` frames are taken, in order.

    Of a time-lapse (`whole`) evenly from its first frame to its last; else a window with stride 4, or the largest
    stride that fits, whose start is a pure function of `key`. A clip with too few frames repeats them evenly.
    """
    if length < frames:
        return [place * length // frames for place in range(frames)]
    if frames == 1:
        return [0 if whole else keyed_choice("window", key, length)]
    if whole:
        return [(2 * place * (length - 1) + frames - 1) // (2 * (frames - 1)) for place in range(frames)]
    stride = min(STRIDE, (length - 1) // (frames - 1))
    span = (frames - 1) * stride + 1
    start = keyed_choice("window", key, length - span + 1)
    return list(range(start, start + span, stride))


def keyed_choice(purpose: str, key: str, choices: int) -> int:
    """A number below `choices`, evenly drawn, that depends on (purpose, key) alone."""
    digest = hashlib.blake2b(repr((purpose, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little") % choices  # of 2^128: the remainder's bias is nothing


def require_av() -> None:
    """Raises DataError unless PyAV can be imported."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise DataError(f"clips are decoded by PyAV ({error}): pip install 'seppo_fast[video]'") from error


Choose = Callable[[int], list[int]]


def _from_array(name: str, pixels: np.ndarray, choose: Choose, resolution: int) -> tuple[dict[int, np.ndarray], int]:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ImageError(name, f"a clip's pixels must be uint8 (F, H, W, 3), got {pixels.dtype} {pixels.shape}")
    if not len(pixels):
        raise ImageError(name, "no frames")
    wanted = set(choose(len(pixels)))
    return {index: fit_square(Image.fromarray(pixels[index]), resolution) for index in wanted}, len(pixels)


def _from_file(name: str, stream: BinaryIO, choose: Choose, resolution: int) -> tuple[dict[int, np.ndarray], int]:
    """The chosen frames by number, and how many the file has; none but the chosen ones are kept."""
    require_av()
    import av

    demuxer = _demuxer(name, stream)
    try:
        length = _count_frames(name, stream, demuxer)
        squares, found = _decode(name, stream, demuxer, choose(length), length, resolution)
        if found != length:
            # a packet need not hold one frame exactly (hidden or packed ones); the decoder's count is the clip's
            squares, found = _decode(name, stream, demuxer, choose(found), found, resolution)
        return squares, found
    except ImageError:
        raise
    except av.FFmpegError as error:
        raise ImageError(name, f"truncated or damaged ({error.strerror})") from error
    except Exception as error:  # a damaged file raises whatever PyAV trips over
        raise ImageError(name, f"truncated or damaged ({error})") from error


def _demuxer(name: str, stream: BinaryIO) -> str:
    """libavformat's name for the container, from the file's first bytes; raises ImageError.

    Named, so that a file is never handed to a demuxer that opens other files or addresses (playlists).
    """
    head = stream.read(12)
    if not head:
        raise ImageError(name, "zero bytes")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    raise ImageError(name, "not a video (mp4, mov, m4v, webm, mkv and avi are read)")


def _open(name: str, stream: BinaryIO, demuxer: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """The container and its moving pictures, with nothing decoded that is larger than an image may be."""
    import av

    stream.seek(0)
    limits = {"max_pixels": str(2 * MAX_PIXELS)}  # decoders round sizes up; the exact limit is told below
    container = av.open(stream, "r", format=demuxer, options=limits, metadata_errors="replace")
    videos = [video for video in container.streams.video if not video.disposition & av.stream.Disposition.attached_pic]
    if not videos:
        sound = "audio only" if container.streams.audio else "truncated or damaged"
        raise ImageError(name, f"{sound}: no video stream")
    video = videos[0]
    context = video.codec_context
    if context is None:
        raise ImageError(name, "no decoder here reads its video stream")
    width, height = context.width, context.height
    if not width * height:
        raise ImageError(name, "damaged or too large: no picture size, or far more than 64 megapixels")
    if width * height > MAX_PIXELS:
        raise ImageError(name, f"too large: {width} x {height} is {width * height / 1e6:.0f} megapixels, 64 at most")
    context.options = limits
    context.thread_count = 1  # clips are decoded side by side, and threads of one would each hold frames
    return container, video


def _count_frames(name: str, stream: BinaryIO, demuxer: str) -> int:
    """Reads every packet and decodes none: the count, and whether the file goes on to where its header says."""
    container, video = _open(name, stream, demuxer)
    length, end = 0, 0.0
    with container:
        for packet in container.demux():
            if packet.is_corrupt:
                raise ImageError(name, "truncated or damaged (a packet is cut short)")
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index == video.index and packet.size and not packet.is_discard:
                length += 1
        begin, duration = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
    if demuxer == "matroska":
        duration -= begin  # FFmpeg writes the time of the end there
    if begin + duration - end > 0.1 + 0.05 * duration:  # headers round, and count streams of several ends
        raise ImageError(name, f"truncated (ends after {max(0.0, end - begin):.1f} of {duration:.1f} seconds)")
    if not length:
        raise ImageError(name, "no frames")
    return length


def _decode(
    name: str, stream: BinaryIO, demuxer: str, wanted: Sequence[int], length: int, resolution: int
) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames as squares, by number, and `length`, or how many frames there are if that turns out wrong."""
    container, video = _open(name, stream, demuxer)
    chosen, squares, size = set(wanted), {}, None
    number = -1
    with container:
        for number, frame in enumerate(container.decode(video)):
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) != size:
                raise ImageError(
                    name,
                    f"changes size in mid-stream, {size[0]} x {size[1]} to {frame.width} x {frame.height} "
                    f"at frame {number}",
                )
            if frame.is_corrupt:
                raise ImageError(name, f"truncated or damaged (frame {number})")
            if number in chosen:
                squares[number] = fit_square(_upright(frame), resolution)
            if number == wanted[-1] < length - 1:
                return squares, length
    if number < 0:
        raise ImageError(name, "no frames")
    return squares, number + 1


def _upright(frame: av.VideoFrame) -> Image.Image:
    """RGB without alpha, turned and mirrored as the file's display matrix says."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    told = frame.side_data.get("DISPLAYMATRIX")
    if told is None:
        return image
    # (x, y) goes to (a x + c y, b x + d y), y down; `frame.rotation` leaves mirroring out.
    a, b, _, c, d = np.frombuffer(bytes(told), np.int32)[:5].astype(np.float64)
    if a * d < b * c:
        image, a, b = ImageOps.mirror(image), -a, -b
    angle = -math.degrees(math.atan2(b, a))  # counterclockwise
    return image.rotate(angle, expand=True) if angle else image
