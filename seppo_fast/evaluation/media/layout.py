"""Exports generated clips in the folder layout of ChronoMagic-Bench, so that its official scripts read them unchanged.

FOLDER/chronomagic/<model>/<sample>/<prompt id>.mp4      with three samples per prompt
FOLDER/chronomagic/<model>/<prompt id>.mp4               with one
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from seppo_fast.evaluation.media.files import FRAME_MILLISECONDS, decode_media
from seppo_fast.evaluation.media.items import Media
from seppo_fast.evaluation.media.work import unfinished
from seppo_fast.evaluation.metrics.chronomagic import SAMPLES, official_path
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import remove_temporary, write_atomically
from seppo_fast.utils.progress import progress

LAYOUTS = ("chronomagic",)
_OPTIONS = {"crf": "10", "preset": "medium"}  # H.264 at a quality at which losses are hardly measurable
_MARK = "seppo_fast "  # before the digest of the clip's source, in the file's comment


def require_layout(models: Sequence[str], ids: Sequence[str], samples: int, *, clips: bool) -> None:
    """Checks that clips can be exported, before anything is generated.

    Args:
        models: the models' names.
        ids: the prompts' ids.
        samples: samples per prompt.
        clips: whether the models make clips.

    Raises:
        ConfigError: the models make pictures, the number of samples is not one of the benchmark's, a name is no file
            name, an id is repeated, or PyAV or its H.264 encoder is missing.
    """
    if not clips:
        raise ConfigError("--layout chronomagic: is for clips, but these models make pictures")
    if samples not in (1, SAMPLES):
        raise ConfigError(f"--layout chronomagic: needs --samples {SAMPLES}, or 1, got {samples}")
    if len(set(ids)) < len(ids):
        twice = next(own for own in ids if ids.count(own) > 1)
        raise ConfigError(f"--layout chronomagic: two prompts have the id {twice!r}, which names their files")
    try:
        for model in models:
            for own in ids:
                official_path(model, own, 1)
    except ValueError as problem:
        raise ConfigError(f"--layout chronomagic: {problem}; change the prompt's id or the run's folder") from problem
    _require_encoder()


def export_layout(folder: Path, media: Media, rank: int = 0, world: int = 1) -> Path:
    """Writes the clips of a folder as mp4 files; those that exist for the same clips are kept.

    Args:
        folder: the folder with the media.
        media: the items; `require_layout` accepts their models and ids.
        rank: this process's rank.
        world: the number of processes.

    Returns:
        The folder with a subfolder per model.

    Raises:
        DataError: a clip is damaged.
        CheckpointError: a file cannot be written.
    """
    place = folder / LAYOUTS[0]
    ids = {item.prompt_index: item.id for item in media.items if item.sample == 0}
    several = len({item.sample for item in media.items}) > 1
    clips = [
        (place / official_path(model, ids[item.prompt_index], item.sample + 1 if several else None), item.files[model])
        for model in media.models
        for item in media.items
    ]

    def done(number: int) -> bool:
        file, source = clips[number]
        return _mark_of(file) == _mark((folder / source).read_bytes())

    with progress(len(clips), "exported", "clips") as advance:
        for number in unfinished(place / ".lock", len(clips), done, rank, world):
            file, source = clips[number]
            content = (folder / source).read_bytes()
            remove_temporary(file.parent, {file.name})
            video = encode_mp4(decode_media(content, str(folder / source)), _mark(content))
            fault("layout-write")
            write_atomically(file, video, CheckpointError)
            advance(1)
    return place


def encode_mp4(clip: np.ndarray, comment: str = "") -> bytes:
    """Returns a clip `(F, H, W, 3)` uint8, H and W even, as an H.264 mp4 with 4:2:0 chroma, which all players read."""
    import av

    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(1000, FRAME_MILLISECONDS), options=_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # so that the same clip gives the same bytes
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


def _require_encoder() -> None:
    try:
        import av
    except ImportError as problem:
        raise ConfigError(
            f"--layout chronomagic: PyAV is needed to write mp4 files ({problem}): pip install 'seppo_fast[video]'"
        ) from problem
    if "libx264" not in av.codecs_available:
        raise ConfigError(
            f"--layout chronomagic: PyAV {av.__version__} was built without the H.264 encoder libx264; install the "
            "wheel of PyAV: pip install --force-reinstall 'seppo_fast[video]'"
        )


def _mark(content: bytes) -> str:
    return _MARK + hashlib.sha256(content).hexdigest()


def _mark_of(file: Path) -> str | None:
    """Returns the comment of an exported file; None if it is missing or unreadable."""
    import av

    if not file.is_file():
        return None
    try:
        with av.open(str(file), "r", format="mp4") as container:
            return container.metadata.get("comment")
    except (av.FFmpegError, OSError):
        return None
