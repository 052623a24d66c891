"""Procedural captioned clips: one coloured shape that grows, shrinks, moves or stays still.

As in the world of pictures, everything is a pure function of explicit seeds, and captions can be parsed. A clip's
frames are evenly spaced in time over its motion, however many there are. Lengths are in pixels, y points down.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .world import AREAS, COLOURS, EXTENTS, MARGIN, SHAPES, SIZE, SIZES, coverage

FRAMES = 8  # per clip of the embedded world
DIRECTIONS = {  # (x, y) of each move
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
RESIZING = ("grows", "shrinks")  # from small to large, or back; their captions name no size
STILL = "stays still"
MOTIONS = (*RESIZING, *DIRECTIONS, STILL)
TRAVEL = (10.0, 12.0)  # range of pixels that a moving thing covers from the first frame to the last
OFF_MIDDLE = 1.5  # at most so many pixels lie between the middle of a path and the middle of the space for it


@dataclass(frozen=True)
class Action:
    """What a caption says about a clip; `size` is empty for a thing that grows or shrinks."""

    size: str
    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Pose:
    """A thing's centroid in one frame, and its area in square pixels."""

    x: float
    y: float
    area: float


@dataclass(frozen=True)
class MovingScene:
    """An action with everything that rendering needs: first and last pose, background and colour (RGB in 0..255)."""

    action: Action
    first: Pose
    last: Pose
    background: tuple[float, float, float]
    colour: tuple[float, float, float]


def moving_scene(seed: int, index: int) -> MovingScene:
    """Returns scene number `index` of `seed`; a pure function of both."""
    # The world's pictures use the key [seed, index], their noisy captions [seed, index, 1].
    rng = np.random.default_rng([seed, index, 2])
    return arrange(describe(rng), rng)


def describe(rng: np.random.Generator) -> Action:
    """Draws an action; all motions are equally likely."""
    motion = str(rng.choice(MOTIONS))
    size, colour, shape = (str(rng.choice(words)) for words in (SIZES, list(COLOURS), SHAPES))
    return Action("" if motion in RESIZING else size, colour, shape, motion)


def arrange(action: Action, rng: np.random.Generator) -> MovingScene:
    """Draws the places, exact areas and exact colours that `action` leaves open."""
    small, large = rng.uniform(*AREAS["small"]), rng.uniform(*AREAS["large"])
    kept = small if action.size == "small" else large
    areas = {"grows": (small, large), "shrinks": (large, small)}.get(action.motion, (kept, kept))
    way = np.array(DIRECTIONS.get(action.motion, (0, 0))) * rng.uniform(*TRAVEL)
    extents = np.array(EXTENTS[action.shape]) * max(areas) ** 0.5
    low, high = extents[:2] + MARGIN, SIZE - MARGIN - extents[2:]  # range of the centroid
    # Everything happens around the middle, so the caption determines nearly all of every frame, and a tiny model learns
    # the world in minutes.
    start = (low + high) / 2 + rng.uniform(-OFF_MIDDLE, OFF_MIDDLE, 2) - way / 2
    first, last = (
        Pose(float(x), float(y), float(area)) for (x, y), area in zip((start, start + way), areas, strict=True)
    )
    background = rng.uniform(-4, 4, 3) + rng.uniform(225, 245)
    colour = np.array(COLOURS[action.colour]) + rng.uniform(-8, 8, 3)
    return MovingScene(action, first, last, _rgb(background), _rgb(colour))


def caption(scene: MovingScene) -> str:
    """Returns the caption that describes `scene`."""
    return phrase(scene.action)


def phrase(action: Action) -> str:
    """Writes an action as text: "a red circle grows", "a small blue square moves left"; inverse of `parse`."""
    words = ("a", action.size, action.colour, action.shape, action.motion)
    return " ".join(word for word in words if word)


_CAPTION = re.compile(
    rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
)  # fmt: skip


def parse(caption: str) -> Action:
    """Parses a caption.

    Raises:
        ValueError: `caption` does not have the form "a red circle grows" or "a small blue square moves left": things
            that grow or shrink have no size, all others have one.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None or (match[1] is None) != (match[4] in RESIZING):
        raise ValueError(
            f"caption must read like 'a red circle grows' or 'a small blue square moves left', got {caption!r}"
        )
    return Action(match[1] or "", match[2], match[3], match[4])


def all_captions() -> list[str]:
    """Returns all 288 captions of the world of clips in a fixed order; in 48 of them a thing grows or shrinks."""
    return [
        phrase(Action(size, colour, shape, motion))
        for motion in MOTIONS
        for colour in COLOURS
        for shape in SHAPES
        for size in (("",) if motion in RESIZING else SIZES)
    ]


def captions(held_out: bool) -> list[str]:
    """Returns the held-out captions or the rest, in a fixed shuffled order.

    About a quarter of all captions are held out: the embedded data set of winners never contains them.
    """
    marks = {caption: hashlib.sha256(caption.encode()).digest() for caption in all_captions()}
    return sorted(
        (caption for caption, mark in marks.items() if (mark[0] < 64) == held_out), key=lambda c: marks[c][1:]
    )


def noisy_caption(scene: MovingScene, seed: int, index: int, wrong: float = 0.35) -> str:
    """Returns a noisy caption, as found on the web: with probability `wrong` it names another motion.

    The wrong motion is one of the six others. If it needs a size and `scene` has none, the size is drawn. The result is
    a pure function of the arguments.
    """
    if not 0 <= wrong <= 1:
        raise ValueError(f"wrong must lie in 0..1, got {wrong}")
    rng = np.random.default_rng([seed, index, 3])
    if rng.random() >= wrong:
        return caption(scene)
    action = scene.action
    motion = str(rng.choice([other for other in MOTIONS if other != action.motion]))
    size = "" if motion in RESIZING else action.size or str(rng.choice(SIZES))
    return phrase(Action(size, action.colour, action.shape, motion))


def render(scene: MovingScene, frames: int = FRAMES) -> NDArray[np.uint8]:
    """Renders `scene` as uint8 RGB of shape (frames, SIZE, SIZE, 3), anti-aliased.

    The motion slows down to a stop. So most frames are nearer to its end than to its beginning, and single frames
    already distinguish a motion from its opposite. At constant speed only the combination of word, frame order and
    place does, which no tiny model learned.

    Raises:
        ValueError: `frames` is less than 2, too few to show motion.
    """
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    first, last = scene.first, scene.last
    part = slowing(np.linspace(0, 1, frames))
    x, y = first.x + (last.x - first.x) * part, first.y + (last.y - first.y) * part
    cover = coverage(scene.action.shape, x, y, first.area * (last.area / first.area) ** part)[..., None]
    clip = np.array(scene.background, np.float32) * (1 - cover) + np.array(scene.colour, np.float32) * cover
    return np.clip(np.rint(clip), 0, 255).astype(np.uint8)


def slowing(time: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the share of its path that a thing has covered at a time in 0..1, if its speed falls linearly to zero."""
    return time * (2 - time)


def _rgb(values: NDArray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
