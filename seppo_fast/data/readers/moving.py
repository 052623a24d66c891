"""The data set of clips of the embedded moving world."""

from __future__ import annotations

import hashlib
import itertools
from functools import partial
from typing import TYPE_CHECKING

from seppo_fast.data.examples import Example, Source
from seppo_fast.data.media.images import ImageRef

if TYPE_CHECKING:
    from seppo_fast.shapes.motion import MovingScene

_ROW = 2**32  # distance between a clip's candidate numbers; larger than any data set


class MovingShapesSource(Source):
    """The first `count` clips of the embedded world for `seed`, rendered on demand.

    An example's image opens to uint8 pixels (F, 32, 32, 3), with F = `seppo_fast.shapes.motion.FRAMES`. Its caption is
    the true one, never one of the held-out captions (`motion.captions`).
    """

    clips = True

    def __init__(self, spec: str, count: int, seed: int) -> None:
        super().__init__(spec)
        self.count = count
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def _example(self, index: int) -> Example:
        from seppo_fast.shapes.motion import caption, render

        drawn = self._scene(index)
        name = f"shapes-motion-{self.seed}-{index}"
        return Example(name, caption(drawn), ImageRef(name, partial(render, drawn)), time_lapse=True)

    def _scene(self, index: int) -> MovingScene:
        """Returns the first scene whose caption is not held out, of the numbers `index`, `index + _ROW`, ...."""
        from seppo_fast.shapes.motion import caption, captions, moving_scene

        scenes = (moving_scene(self.seed, index + attempt * _ROW) for attempt in itertools.count())
        held_out = set(captions(held_out=True))
        return next(scene for scene in scenes if caption(scene) not in held_out)

    def digest(self) -> str:
        """Digests seed, count, and captions and pixels of the first 64 clips, so that it changes if the world does."""
        from seppo_fast.shapes.motion import caption, render

        sha = hashlib.sha256(f"shapes-motion {self.seed} {self.count}".encode())
        for index in range(min(self.count, 64)):
            drawn = self._scene(index)
            sha.update(caption(drawn).encode())
            sha.update(render(drawn).tobytes())
        return sha.hexdigest()
