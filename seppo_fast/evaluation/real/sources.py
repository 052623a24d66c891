"""Where real pictures or clips come from: a folder, or the embedded worlds, drawn for the same prompts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from seppo_fast.data.media.images import fit_square
from seppo_fast.evaluation.real.folder import RealFolder
from seppo_fast.evaluation.real.sets import RealSet, Wanted
from seppo_fast.shapes import motion, world
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.random import keyed_rng

SHAPES = "shapes"  # the value of --real for the embedded worlds
_DRAWS = 2  # real pictures per generated one, so that the floor compares as many with as many


class RealShapes(RealSet):
    """Pictures or clips of the embedded worlds for the same prompts, two for each generated one.

    A picture is a pure function of its prompt's place in the prompt file and of its number among those of the prompt;
    the first one is the prompt's counterpart.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._draws = _DRAWS * wanted.samples
        module = world if wanted.frames is None else motion
        for own, text in wanted.prompts:
            try:
                module.parse(text)
            except ValueError as problem:
                raise DataError(
                    f"--real {SHAPES}: prompt {own} is no caption of the embedded world ({problem}); name a folder of "
                    "real pictures instead"
                ) from problem
        names = [f"{SHAPES} {own}, {draw}" for own, _ in wanted.prompts for draw in range(self._draws)]
        super().__init__(SHAPES, names, wanted)

    def digest(self, place: int) -> str:
        """See the base class; the content is the pixels."""
        return hashlib.sha256(self.load(place, fitted=False).tobytes()).hexdigest()

    def load(self, place: int, *, fitted: bool = True) -> np.ndarray:
        """See the base class."""
        prompt, draw = divmod(place, self._draws)
        rng, text = keyed_rng(0, "real shapes", prompt, draw), self.wanted.prompts[prompt][1]
        if self.wanted.frames is None:
            picture = world.render(world.arrange(world.parse(text), rng))
            return _fitted(picture, self.wanted.resolution) if fitted else picture
        clip = motion.render(motion.arrange(motion.parse(text), rng), max(2, self.wanted.frames))
        return np.stack([_fitted(frame, self.wanted.resolution) for frame in clip[: self.wanted.frames]])

    def counterparts(self) -> list[int]:
        """See the base class; every prompt has one."""
        return [place * self._draws for place in range(len(self.wanted.prompts))]

    def prompt_places(self) -> list[int]:
        """See the base class."""
        return [place // self._draws for place in range(len(self.names))]


def open_real(spec: str, wanted: Wanted) -> RealSet:
    """Opens the real pictures or clips that `--real` names, without decoding them.

    Raises:
        ConfigError: the folder does not exist.
        DataError: it is empty or holds the other kind of files, or a prompt is no caption of the embedded world.
    """
    return RealShapes(wanted) if spec == SHAPES else RealFolder(spec, wanted)


def require_real(spec: str) -> None:
    """Raises ConfigError unless `--real` names an existing folder or the embedded worlds."""
    if spec != SHAPES and not Path(spec).expanduser().is_dir():
        raise ConfigError(f"--real {spec}: not a folder; name one with real pictures or clips, or {SHAPES!r}")


def _fitted(picture: np.ndarray, resolution: int) -> np.ndarray:
    return fit_square(Image.fromarray(picture), resolution)
