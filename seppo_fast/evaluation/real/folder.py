"""A folder of real pictures, or of clips: video files, animated WebP files, or folders of frames."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from seppo_fast.data.examples import Example
from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.frames import choose_frames
from seppo_fast.data.media.images import MAX_PIXELS, ImageError, decode_image, file_ref, fit_square, open_image
from seppo_fast.data.names import relative_name, walk_files
from seppo_fast.data.readers.folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from seppo_fast.evaluation.media.files import decode_media, is_marked
from seppo_fast.evaluation.real.sets import RealSet, Wanted, listed
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import home_expanded

_WEBP = ".webp"


class RealFolder(RealSet):
    """The pictures or clips below a folder, sorted by path.

    A picture is a file x.png, x.jpg, x.jpeg or x.webp. A clip is a video file, an animated x.webp, or a subfolder with
    its frames as pictures, in the order of the numbers in their names. A prompt's counterpart is the one whose name
    without suffix is the prompt's id.

    Raises:
        ConfigError: the folder does not exist.
        DataError: it holds no such file, or files of the other kind.
    """

    def __init__(self, spec: str, wanted: Wanted) -> None:
        self._folder = home_expanded(spec, ConfigError)
        if not self._folder.is_dir():
            raise ConfigError(f"--real {spec}: not a folder")
        files = walk_files(self._folder)
        found = _pictures(spec, files) if wanted.frames is None else _clips(spec, self._folder, files)
        if not found:
            kinds = IMAGE_SUFFIXES if wanted.frames is None else (*VIDEO_SUFFIXES, _WEBP)
            more = "" if wanted.frames is None else ", or folders of frames"
            raise DataError(f"--real {spec}: the folder holds no file {', '.join(kinds)}{more}")
        self._paths = list(found.values())
        self._are_frames = [files != (path,) for path, files in found.items()]
        names = [relative_name(path, self._folder) for path in found]
        super().__init__(self._folder.resolve().name, names, wanted)

    def digest(self, place: int) -> str:
        """See the base class."""
        sha = hashlib.sha256()
        for path in self._paths[place]:
            try:
                sha.update(path.read_bytes())
            except OSError as problem:
                raise DataError(f"{path}: cannot be read ({problem.strerror})") from problem
        return sha.hexdigest()

    def load(self, place: int, *, fitted: bool = True) -> np.ndarray:
        """See the base class."""
        first, resolution, frames = self._paths[place][0], self.wanted.resolution, self.wanted.frames
        if frames is None:
            image = _decoded(first)
            return fit_square(image, resolution) if fitted else np.asarray(image)
        if first.suffix.lower() in VIDEO_SUFFIXES:
            ref = file_ref(first)
            clip = load_clip(
                Example(str(first), "", ref, time_lapse=True), ref.name, open_image(ref), resolution, frames
            )
            if "repeating" in clip.remarks:
                raise ImageError(ref.name, f"has fewer than {frames} frames, as many as the models generate")
            return clip.pixels
        if self._are_frames[place]:
            paths = self._paths[place]
            images = [_decoded(paths[number]) for number in _spread(str(first.parent), len(paths), frames)]
        else:
            images = _animation(first, frames)
        return np.stack([fit_square(image, resolution) for image in images])

    def counterparts(self) -> list[int]:
        """See the base class."""
        by_name = self._by_name()
        lacking = [f"{own}: {text[:60]}" for own, text in self.wanted.prompts if own not in by_name]
        if lacking:
            raise DataError(
                f"{self._folder}: {len(lacking)} of {len(self.wanted.prompts)} prompts have no real counterpart, a "
                f"file named like the prompt's id; the folder has {self.names[0]!r} and others. Prompts without one, "
                f"by id:\n{listed(lacking)}"
            )
        twice = [own for own, _ in self.wanted.prompts if len(by_name[own]) > 1]
        if twice:
            names = ", ".join(self.names[place] for place in sorted(by_name[twice[0]]))
            raise DataError(f"{self._folder}: several files are named like the id {twice[0]!r}: {names}; keep one")
        return [next(iter(by_name[own])) for own, _ in self.wanted.prompts]

    def prompt_places(self) -> list[int]:
        """See the base class."""
        by_name, found = self._by_name(), [-1] * len(self.names)
        for number, (own, _) in enumerate(self.wanted.prompts):
            for place in by_name.get(own, ()):
                found[place] = number
        return found

    def _by_name(self) -> dict[str, set[int]]:
        """Maps each file's name without suffix, with and without its folders, to the file's place."""
        by_name: dict[str, set[int]] = {}
        for place, name in enumerate(self.names):
            known = name if self._are_frames[place] else str(Path(name).with_suffix(""))
            for key in {known, Path(known).name}:
                by_name.setdefault(key, set()).add(place)
        return by_name


def _pictures(spec: str, files: list[Path]) -> dict[Path, tuple[Path, ...]]:
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES or (
            path.suffix.lower() == _WEBP and _is_animated(path, damaged=False)
        ):
            raise DataError(f"--real {spec}: {path.name} is a clip, but these models make pictures")
    return {path: (path,) for path in files if path.suffix.lower() in IMAGE_SUFFIXES}


def _clips(spec: str, folder: Path, files: list[Path]) -> dict[Path, tuple[Path, ...]]:
    """Returns each clip's files by the path that names it."""
    clips: dict[Path, list[Path]] = {}
    for path in files:
        suffix = path.suffix.lower()
        if suffix in VIDEO_SUFFIXES or (suffix == _WEBP and _is_animated(path, damaged=True)):
            clips[path] = [path]
        elif suffix in IMAGE_SUFFIXES and path.parent == folder:
            raise DataError(
                f"--real {spec}: {path.name} is a picture, but these models make clips; put the frames of each clip "
                "into a folder of their own"
            )
        elif suffix in IMAGE_SUFFIXES:
            clips.setdefault(path.parent, []).append(path)
    return {name: tuple(sorted(paths, key=_by_number)) for name, paths in clips.items()}


def _by_number(path: Path) -> list[tuple[str, int]]:
    """Returns a key that sorts names by the numbers in them: 2.png precedes 10.png."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", path.name)]


def _decoded(path: Path) -> Image.Image:
    return decode_image(str(path), open_image(file_ref(path)))


def _is_animated(path: Path, *, damaged: bool) -> bool:
    """Returns whether a WebP file is a clip, also one whose frames are all equal; `damaged` if it cannot be read."""
    try:
        with Image.open(path, formats=("WEBP",)) as opened:
            return getattr(opened, "n_frames", 1) > 1 or is_marked(opened)
    except (OSError, SyntaxError, ValueError):  # reported when it is decoded
        return damaged


def _animation(path: Path, frames: int) -> list[Image.Image]:
    """Returns frames of an animated WebP, evenly spaced whatever their durations; raises ImageError."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("WEBP",)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError("its frames have more than 64 megapixels")
            if not is_marked(opened):  # only the chosen frames are kept in memory
                numbers = set(_spread(str(path), getattr(opened, "n_frames", 1), frames))
                every = enumerate(ImageSequence.Iterator(opened))
                return [frame.convert("RGB") for number, frame in every if number in numbers]
        clip = decode_media(content, path.name)
        return [Image.fromarray(clip[number]) for number in _spread(str(path), len(clip), frames)]
    except ImageError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, DataError) as problem:
        raise ImageError(str(path), f"truncated, damaged or too large ({problem})") from problem


def _spread(name: str, count: int, frames: int) -> list[int]:
    """Returns the numbers of a clip's chosen frames; raises ImageError if it has too few."""
    if count < frames:
        raise ImageError(name, f"has {count} frames, fewer than the {frames} that the models generate")
    return choose_frames(count, frames, whole=True, key="")
