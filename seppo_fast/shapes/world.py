"""Procedural captioned pictures: one coloured shape, or two in a spatial relation, on a light background.

Everything is a pure function of explicit seeds, and captions can be parsed: `parse(caption(scene))` returns the scene's
description. Lengths are in pixels, y points down.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
COLOURS = {
    "red": (220, 40, 45),
    "green": (30, 175, 60),
    "blue": (40, 85, 220),
    "yellow": (245, 205, 30),
    "purple": (165, 55, 200),
    "black": (30, 30, 35),
}
AREAS = {"small": (36.0, 44.0), "large": (88.0, 100.0)}  # square pixels, the same range for every shape
SUPERSAMPLING = 4
# Extents (left, top, right, bottom) from the centroid of a shape with area 1.
EXTENTS = {
    "circle": (np.pi**-0.5,) * 4,
    "square": (0.5,) * 4,
    "triangle": (0.5**0.5, 8**0.5 / 3, 0.5**0.5, 2**0.5 / 3),
    "cross": (1.5 / 5**0.5,) * 4,
}
MARGIN = 1.0  # least distance to the picture's edge
GAP = 1.5  # least distance between two objects along their relation's axis


@dataclass(frozen=True)
class Thing:
    """What a caption says about one object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Description:
    """What a caption says: one thing, or two and the relation of the first to the second; "" for one thing."""

    things: tuple[Thing, ...]
    relation: str = ""


@dataclass(frozen=True)
class Scene:
    """A description with everything that rendering needs.

    `centres` are (x, y) centroids and `areas` square pixels, one per thing; `background` and `colours` are RGB in
    0..255, the latter one per thing.
    """

    description: Description
    centres: tuple[tuple[float, float], ...]
    areas: tuple[float, ...]
    background: tuple[float, float, float]
    colours: tuple[tuple[float, float, float], ...]


def describe(rng: np.random.Generator) -> Description:
    """Draws a description: one thing or two, equally likely; two always have different colours."""
    count = int(rng.integers(1, 3))
    colours = rng.permutation(list(COLOURS))[:count]
    things = tuple(Thing(str(rng.choice(SIZES)), str(colour), str(rng.choice(SHAPES))) for colour in colours)
    return Description(things, str(rng.choice(RELATIONS)) if count == 2 else "")


def scene(seed: int, index: int) -> Scene:
    """Returns scene number `index` of `seed`; a pure function of both."""
    rng = np.random.default_rng([seed, index])
    return arrange(describe(rng), rng)


def arrange(description: Description, rng: np.random.Generator) -> Scene:
    """Draws the places, exact areas and exact colours that `description` leaves open."""
    things = description.things
    areas = tuple(float(rng.uniform(*AREAS[thing.size])) for thing in things)
    extents = [np.array(EXTENTS[thing.shape]) * area**0.5 for thing, area in zip(things, areas, strict=True)]
    centres: tuple[tuple[float, float], ...]
    if description.relation:
        centres = _place_two(extents, description.relation, rng)
    else:
        low, high = extents[0][:2] + MARGIN, SIZE - MARGIN - extents[0][2:]
        x, y = rng.uniform(low, high)
        centres = ((float(x), float(y)),)
    grey = rng.uniform(225, 245)
    background = rng.uniform(-4, 4, 3) + grey
    colours = [np.array(COLOURS[thing.colour]) + rng.uniform(-8, 8, 3) for thing in things]
    return Scene(description, centres, areas, _rgb(background), tuple(_rgb(colour) for colour in colours))


def caption(scene: Scene) -> str:
    """Returns the caption that describes `scene`."""
    return phrase(scene.description)


def phrase(description: Description) -> str:
    """Writes a description as text; inverse of `parse`."""
    return f" {description.relation} ".join(f"a {thing}" for thing in description.things)


_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?")


def parse(caption: str) -> Description:
    """Parses a caption.

    Raises:
        ValueError: `caption` does not have the form "a large red circle" or "a large red circle left of a small blue
            square", or both things have the same colour.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise ValueError(
            f"caption must read like 'a large red circle' or 'a large red circle left of a small blue square', "
            f"got {caption!r}"
        )
    groups = match.groups()
    if groups[3] is None:
        return Description((Thing(*groups[:3]),))
    if groups[1] == groups[5]:
        raise ValueError(f"caption must name two different colours, got {caption!r}")
    return Description((Thing(*groups[:3]), Thing(*groups[4:])), groups[3])


def noisy_caption(scene: Scene, seed: int, index: int, wrong: float = 0.35) -> str:
    """Returns a noisy caption, as found on the web: with probability `wrong` it describes another random scene.

    Such a caption may still be partly right by chance. The result is a pure function of the arguments.
    """
    if not 0 <= wrong <= 1:
        raise ValueError(f"wrong must lie in 0..1, got {wrong}")
    rng = np.random.default_rng([seed, index, 1])
    return phrase(describe(rng)) if rng.random() < wrong else caption(scene)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Renders `scene` as uint8 RGB of shape (SIZE, SIZE, 3), anti-aliased."""
    picture = np.broadcast_to(np.array(scene.background, np.float32), (SIZE, SIZE, 3))
    for thing, centre, area, colour in zip(
        scene.description.things, scene.centres, scene.areas, scene.colours, strict=True
    ):
        cover = coverage(thing.shape, [centre[0]], [centre[1]], [area])[0, :, :, None]
        picture = picture * (1 - cover) + np.array(colour, np.float32) * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def coverage(
    shape: str, x: Sequence[float] | NDArray, y: Sequence[float] | NDArray, area: Sequence[float] | NDArray
) -> NDArray[np.float32]:
    """Returns the share of each pixel that `shape` covers, (n, SIZE, SIZE) in 0..1, for n centroids and areas."""
    ticks = ((np.arange(SIZE * SUPERSAMPLING) + 0.5) / SUPERSAMPLING).astype(np.float32)
    scale = np.sqrt(np.asarray(area, np.float32))[:, None]
    u = ((ticks - np.asarray(x, np.float32)[:, None]) / scale)[:, None, :]
    v = ((ticks - np.asarray(y, np.float32)[:, None]) / scale)[:, :, None]
    if shape == "circle":
        inside = u * u + v * v <= 1 / np.pi
    elif shape == "square":
        inside = (abs(u) <= 0.5) & (abs(v) <= 0.5)
    elif shape == "triangle":
        inside = (2 * abs(u) <= v + 8**0.5 / 3) & (v <= 2**0.5 / 3)
    elif shape == "cross":
        short, long = 0.5 / 5**0.5, 1.5 / 5**0.5
        inside = ((abs(u) <= short) & (abs(v) <= long)) | ((abs(u) <= long) & (abs(v) <= short))
    else:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    fine = inside.reshape(len(inside), SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING)
    return fine.mean(axis=(2, 4), dtype=np.float32)


def _place_two(
    extents: list[NDArray], relation: str, rng: np.random.Generator
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Draws centroids of two things in `relation`, with at least twice the offset along its axis as across it."""
    axis = 0 if relation in ("left of", "right of") else 1
    first, second = (0, 1) if relation in ("left of", "above") else (1, 0)
    before, after = extents[first], extents[second]
    start, end = before[axis] + MARGIN, SIZE - MARGIN - after[axis + 2]
    least = before[axis + 2] + GAP + after[axis]
    near = rng.uniform(start, end - least)
    far = rng.uniform(near + least, end)
    across = 1 - axis
    bounds = [(part[across] + MARGIN, SIZE - MARGIN - part[across + 2]) for part in (before, after)]
    side = rng.uniform(*bounds[0])
    reach = (far - near) / 2
    # `other` is clipped to its range; then `side` moves towards it if they are further apart than `reach`. Both ranges
    # contain the picture's middle, so this is always possible.
    low, high = bounds[1]
    other = float(np.clip(rng.uniform(side - reach, side + reach), low, high))
    side = float(np.clip(side, other - reach, other + reach))
    places = [[0.0, 0.0], [0.0, 0.0]]
    places[first][axis], places[second][axis] = float(near), float(far)
    places[first][across], places[second][across] = side, other
    return (places[0][0], places[0][1]), (places[1][0], places[1][1])


def _rgb(values: NDArray) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
