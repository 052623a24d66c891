"""Reads a video file: the times at which its frames are shown, and the decoded, upright frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from seppo_fast.data.media.images import MAX_PIXELS, ImageError, fit_square
from seppo_fast.utils.errors import DataError

if TYPE_CHECKING:
    import av

_TRANSFERS = {16: "pq", 18: "hlg"}  # codes of ITU-T H.273: SMPTE ST 2084 and ARIB STD-B67


def require_av() -> None:
    """Raises DataError unless PyAV can be imported."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise DataError(f"PyAV is needed to decode clips ({error}): pip install 'seppo_fast[video]'") from error


class VideoFile:
    """The first video stream of a file (cover images aside), which can be read several times.

    Attributes:
        unit: Length in seconds of one unit of the times that the methods return.
        size: Display width and height before rotation; the height in pixels, the width in units of a pixel's height.
        transfer: "pq" or "hlg" for an HDR clip, else empty.
    """

    def __init__(self, name: str, stream: BinaryIO) -> None:
        """Reads the first bytes and the headers; raises ImageError."""
        self._name, self._stream = name, stream
        self._demuxer = _demuxer(name, stream)
        container, video = self._open()
        with container:
            context = video.codec_context
            self.unit: Fraction = video.time_base
            told = video.sample_aspect_ratio or context.sample_aspect_ratio or 1
            self._aspect = Fraction(told) if told > 0 else Fraction(1)
            self.size = (float(context.width * self._aspect), float(context.height))
            self.transfer = _TRANSFERS.get(int(context.color_trc), "")
            self._rate = video.average_rate or video.guessed_rate or Fraction(30)

    def packet_times(self) -> list[int] | None:
        """Returns the display times of all frames from the packets' headers, ascending, without decoding.

        Returns None if a packet has no time.

        Raises:
            ImageError: the file ends before the end that its header declares, or has no frames.
        """
        container, video = self._open()
        times: list[int | None] = []
        end = 0.0
        starts: dict[int, int] = {}  # the time of each stream's last packet
        with container:
            for packet in container.demux():
                if packet.is_corrupt:
                    raise ImageError(self._name, "truncated or damaged (a packet is cut short)")
                if packet.pts is not None:
                    lasts = packet.duration or packet.pts - starts.get(packet.stream.index, packet.pts)
                    end = max(end, float((packet.pts + lasts) * packet.time_base))
                    starts[packet.stream.index] = packet.pts
                if packet.stream.index == video.index and packet.size and not packet.is_discard:
                    times.append(packet.pts)
            begin, duration = (container.start_time or 0) / 1e6, (container.duration or 0) / 1e6
        if self._demuxer == "matroska":
            duration -= begin  # FFmpeg stores the end time as the duration there
        if begin + duration - end > 0.1 + 0.05 * duration:  # headers round, and streams end at different times
            raise ImageError(
                self._name, f"truncated (ends after {max(0.0, end - begin):.1f} of {duration:.1f} seconds)"
            )
        if not times:
            raise ImageError(self._name, "no frames")
        return None if None in times else sorted({time for time in times if time is not None})

    def frame_times(self) -> list[int]:
        """Decodes all frames and returns their display times, ascending; evenly spaced, changing `unit`, if unknown."""
        times = [frame.pts for frame in self.frames()]
        if None in times or len(set(times)) < len(times):
            self.unit = 1 / Fraction(self._rate)
            return list(range(len(times)))
        return sorted(times)

    def frames(self) -> Iterator[av.VideoFrame]:
        """Yields every frame in display order; raises ImageError if one is damaged or differs in size."""
        container, video = self._open()
        size, number = None, -1
        with container:
            for number, frame in enumerate(container.decode(video)):
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise ImageError(
                        self._name,
                        f"the frame size changes from {size[0]} x {size[1]} to {frame.width} x {frame.height} "
                        f"at frame {number}",
                    )
                if frame.is_corrupt:
                    raise ImageError(self._name, f"truncated or damaged (frame {number})")
                yield frame
        if number < 0:
            raise ImageError(self._name, "no frames")

    def square(self, frame: av.VideoFrame, resolution: int) -> np.ndarray:
        """Returns the centre square of a frame as displayed, in RGB without alpha; see `images.fit_square`."""
        image, lying = _upright(frame)
        return fit_square(image, resolution, 1 / self._aspect if lying else self._aspect)

    def _open(self) -> tuple[av.container.InputContainer, av.VideoStream]:
        """Opens the container and its video stream; refuses frames that are larger than an image may be."""
        import av

        self._stream.seek(0)
        limits = {"max_pixels": str(2 * MAX_PIXELS)}  # decoders round sizes up; the exact limit is checked below
        container = av.open(self._stream, "r", format=self._demuxer, options=limits, metadata_errors="replace")
        cover = av.stream.Disposition.attached_pic
        videos = [video for video in container.streams.video if not video.disposition & cover]
        if not videos:
            sound = "audio only" if container.streams.audio else "truncated or damaged"
            raise ImageError(self._name, f"{sound}: no video stream")
        video = videos[0]
        context = video.codec_context
        if context is None:
            raise ImageError(self._name, "PyAV has no decoder for its video stream; convert it, for example to H.264")
        width, height = context.width, context.height
        if not width * height:
            raise ImageError(self._name, "damaged or too large: its frame size is unknown or far above 64 megapixels")
        if width * height > MAX_PIXELS:
            megapixels = width * height / 1e6
            raise ImageError(
                self._name, f"too large: {width} x {height} is {megapixels:.0f} megapixels, the limit is 64"
            )
        context.options = limits
        context.thread_count = 1  # clips are decoded in parallel; each further thread would hold frames in memory
        return container, video


def _demuxer(name: str, stream: BinaryIO) -> str:
    """Returns libavformat's name for the container, from the file's first bytes; raises ImageError.

    The demuxer is named explicitly, so that FFmpeg never picks one that opens other files or URLs (playlists).
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
    raise ImageError(name, "not a video (supported: mp4, mov, m4v, webm, mkv, avi)")


def _upright(frame: av.VideoFrame) -> tuple[Image.Image, bool]:
    """Returns the frame with the file's display matrix applied, and whether that swapped its width and height."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    told = frame.side_data.get("DISPLAYMATRIX")
    if told is None:
        return image, False
    # (x, y) maps to (a x + c y, b x + d y), with y pointing down; `frame.rotation` omits mirroring.
    a, b, _, c, d = np.frombuffer(bytes(told), np.int32)[:5].astype(np.float64)
    if a * d < b * c:
        image, a, b = ImageOps.mirror(image), -a, -b
    angle = -math.degrees(math.atan2(b, a))  # counterclockwise
    return (image.rotate(angle, expand=True) if angle else image), round(angle / 90) % 2 == 1
