"""Procedural captioned clips: one coloured shape of the world that grows, shrinks, moves or stays still.

As in the world of pictures, everything is a pure function of explicit seeds, and captions can be read back. A clip's
frames are evenly spaced over its motion, however many they are. Lengths are in pixels, y points down.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .world import AREAS, COLOURS, EXTENTS, MARGIN, SHAPES, SIZE, SIZES, coverage

FRAMES = 8  # of a clip of the embedded world
DIRECTIONS = {  # of a move, as (x, y)
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
RESIZING = ("grows", "shrinks")  # from small to large, or back; no size can be asked for
STILL = "stays still"
MOTIONS = (*RESIZING, *DIRECTIONS, STILL)
TRAVEL = (10.0, 12.0)  # pixels that a moving thing covers from the first frame to the last
OFF_MIDDLE = 1.5  # pixels by which the middle of a way misses the middle of the room for it, at most


@dataclass(frozen=True)
class Action:
    """What a caption says of a clip; `size` is empty for a thing that grows or shrinks."""

    size: str
    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class Pose:
    """Where a thing is in one frame, by its centroid, and its area in square pixels."""

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
    """The scene of number `index` in the stream of `seed`; a pure function of both."""
    rng = np.random.default_rng([seed, index, 2])  # 0 and 1: the world's pictures and their noisy captions
    return arrange(describe(rng), rng)


def describe(rng: np.random.Generator) -> Action:
    """Draws an action; each motion has the same chance."""
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
    low, high = extents[:2] + MARGIN, SIZE - MARGIN - extents[2:]  # of a centroid
    # Everything happens around the middle, so the caption alone says nearly all of every frame: a tiny model learns
    # it in minutes.
    start = (low + high) / 2 + rng.uniform(-OFF_MIDDLE, OFF_MIDDLE, 2) - way / 2
    first, last = (
        Pose(float(x), float(y), float(area)) for (x, y), area in zip((start, start + way), areas, strict=True)
    )
    background = rng.uniform(-4, 4, 3) + rng.uniform(225, 245)
    colour = np.array(COLOURS[action.colour]) + rng.uniform(-8, 8, 3)
    return MovingScene(action, first, last, _rgb(background), _rgb(colour))


def caption(scene: MovingScene) -> str:
    """The caption that is true of `scene`."""
    return phrase(scene.action)


def phrase(action: Action) -> str:
    """Spells an action, such as "a red circle grows" or "a small blue square moves left"; `parse` is its inverse."""
    words = ("a", action.size, action.colour, action.shape, action.motion)
    return " ".join(word for word in words if word)


_CAPTION = re.compile(
    rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)})"
)  # fmt: skip


def parse(caption: str) -> Action:
    """Reads a caption back.

    Raises:
        ValueError: `caption` is not of the form "a red circle grows" or "a small blue square moves left": things that
            grow or shrink have no size, all others have one.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None or (match[1] is None) != (match[4] in RESIZING):
        raise ValueError(
            f"caption must read like 'a red circle grows' or 'a small blue square moves left', got {caption!r}"
        )
    return Action(match[1] or "", match[2], match[3], match[4])


def all_captions() -> list[str]:
    """Every caption of the world of clips, in a fixed order: 288, of which 48 grow or shrink."""
    return [
        phrase(Action(size, colour, shape, motion))
        for motion in MOTIONS
        for colour in COLOURS
        for shape in SHAPES
        for size in (("",) if motion in RESIZING else SIZES)
    ]


def captions(held_out: bool) -> list[str]:
    """About a quarter of all captions, which the embedded data set of winners never has, or the rest; fixed, mixed."""
    marks = {caption: hashlib.sha256(caption.encode()).digest() for caption in all_captions()}
    return sorted(
        (caption for caption, mark in marks.items() if (mark[0] < 64) == held_out), key=lambda c: marks[c][1:]
    )


def noisy_caption(scene: MovingScene, seed: int, index: int, wrong: float = 0.35) -> str:
    """A caption as the web has them: with probability `wrong` it names the thing and one of the six other motions.

    A pure function of its arguments. A size that the other motion asks for and `scene` does not have is drawn.
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
    """Draws `scene`: uint8 RGB of shape (frames, SIZE, SIZE, 3), anti-aliased.

    It slows down to a stop: most frames are nearer to the end than to the beginning, so stills alone tell a motion from
    its opposite. At a constant speed only word, order and place together do, and no tiny model found out.

    Raises:
        ValueError: `frames` is less than 2, which shows no motion.
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
    """The part of its way that a thing has gone at a time in 0..1: its speed falls evenly to nothing."""
    return time * (2 - time)


def _rgb(values: NDArray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
