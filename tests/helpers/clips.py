"""Writes real video files with PyAV for tests; the grey levels of each frame encode its number."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from seppo_fast.data.examples import Example
from seppo_fast.data.media.clips import Clip, load_clip
from seppo_fast.data.media.images import file_ref

FIRST_LEVEL, LEVEL_STEP, BASE = 24, 12, 16
_FINE = {
    "mpeg4": {"qmin": "1", "qmax": "1"},
    "mjpeg": {"qmin": "1", "qmax": "1"},
    "libx264": {"crf": "1"},
    "libvpx-vp9": {"crf": "4", "b": "0", "deadline": "realtime", "cpu-used": "8"},
}


def numbered_frames(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Returns uint8 (count, height, width, 3): the greys of upper and lower half are a frame number's two digits."""
    assert count <= BASE**2, "more frames than two digits can encode"
    digits = np.stack(np.divmod(np.arange(count), BASE), axis=1)
    levels = (FIRST_LEVEL + LEVEL_STEP * digits).astype(np.uint8)
    rows = np.arange(height) * 2 // height
    return np.broadcast_to(levels[:, rows, None, None], (count, height, width, 3)).copy()


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """Returns the frame numbers of decoded `numbered_frames`, (F, H, W, 3); fails if a grey encodes no digit."""
    quarter = pixels.shape[1] // 4
    halves = np.stack([pixels[:, :quarter], pixels[:, -quarter:]], axis=1).astype(float)
    places = (halves.mean((2, 3, 4)) - FIRST_LEVEL) / LEVEL_STEP
    digits = np.round(places).astype(int)
    assert np.abs(places - digits).max() < 0.3, f"these are not digits: {places}"
    return [int(high) * BASE + int(low) for high, low in digits]


def write_clip(
    path: Path,
    frames: np.ndarray,
    codec: str = "mpeg4",
    rate: int = 24,
    audio: bool = False,
    gop: int = 12,
    begin: int = 0,
    times: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    transfer: int | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Encodes uint8 frames (F, H, W, 3) into a file whose container follows its suffix.

    Args:
        path: The file to write; its folder is created.
        frames: The pictures; without any, but with audio, mkv and avi files have a video stream without frames.
        codec: An encoder in the PyAV wheel, such as mpeg4, libx264, libvpx-vp9, mjpeg.
        rate: Frames per second.
        audio: Whether to add a second of silence.
        gop: Number of frames from one key frame to the next.
        begin: Time of the first frame, in frames.
        times: Time of each frame, in frames; None: consecutive.
        aspect: Ratio of a pixel's width to its height.
        transfer: Number of the transfer characteristic, as in H.273.
        options: Options of the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.options = _FINE[codec]
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if transfer is not None:
            stream.codec_context.color_trc = transfer
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        sound = container.add_stream("aac", rate=8000) if audio else None
        for time, picture in zip(times or range(begin, begin + len(frames)), frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _mux_silence(container, sound)
    return path


def write_audio(path: Path) -> Path:
    """Writes a file with a second of silence and no video stream."""
    with av.open(str(path), "w") as container:
        _mux_silence(container, container.add_stream("aac", rate=8000))
    return path


def _mux_silence(container: av.container.OutputContainer, stream: av.audio.AudioStream) -> None:
    for start in range(0, 8000, 1000):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_changing_clip(path: Path, first: np.ndarray, second: np.ndarray) -> Path:
    """Writes one stream of JPEG pictures whose size changes where `second` begins."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.height, stream.width = first.shape[1:3]
        stream.pix_fmt = "yuvj420p"
        other = av.CodecContext.create("mjpeg", "w")
        other.height, other.width = second.shape[1:3]
        other.pix_fmt, other.time_base = "yuvj420p", Fraction(1, 24)
        for picture in first:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for number, picture in enumerate(second, start=len(first)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            for packet in other.encode(frame):
                packet.stream = stream
                container.mux(packet)
    return path


def set_display_matrix(path: Path, turn: tuple[int, int, int, int]) -> Path:
    """Sets an mp4 file's display matrix (a, b, c, d), which maps (x, y) to (a x + c y, b x + d y), with y down."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # after the box's name: version, times, id, duration, layer, volume
    assert content[matrix : matrix + 4] == struct.pack(">i", 1 << 16), "the matrix does not begin here"
    a, b, c, d = (value << 16 for value in turn)
    content[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def loaded(path: Path, *, name: str = "x", whole: bool = False, frames: int = 16, **options: object) -> np.ndarray:
    ref = file_ref(path)
    example = Example(name, "a caption", ref, time_lapse=whole)
    return load_clip(example, ref.name, ref.open(), options.pop("resolution", 32), frames, **options).pixels


def load(path: Path, frames: int = 16, name: str = "x", resolution: int = 32, **settings: bool) -> Clip:
    example = Example(name, "a caption", file_ref(path), **settings)
    return load_clip(example, name, example.image.open(), resolution, frames)
