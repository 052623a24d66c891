"""The exact judge of pictures: decides which of the attributes in a prompt a picture has.

It uses no network. Each pixel is read as a mix of the background and one of the world's colours; a colour's pixels give
an area and a centroid, and the shape is the one whose template, drawn there with that area, overlaps best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .world import COLOURS, RELATIONS, SHAPES, SIZE, Description, coverage, parse

MIN_ALPHA = 0.25  # share of a colour in a pixel; fainter pixels are noise or blur, not an object
MIN_COSINE = 0.93  # between a pixel's and a colour's offset from the background; for green and black it is 0.92
WINDOW = 17  # pixels; the side of a square that fits any one thing
MIN_SHARE = 0.45  # share of a colour's pixels inside its fullest window; with less they are scattered noise
MIN_CORE = 14  # pixels that are nearly all colour; the smallest thing has 20
MIN_OVERLAP = 0.72  # of the best template; another shape at the same place and area reaches at most about 0.8
SMALL_LARGE = 63.0  # square pixels; between the largest small and the smallest large thing
AREA_RANGE = (22.0, 130.0)  # square pixels of a thing
MIN_OFFSET = 3.0  # pixels along a relation's axis


@dataclass(frozen=True)
class Finding:
    """What was found of one colour in a picture; `shape` and `size` are empty if none fits."""

    present: bool
    shape: str
    size: str
    x: float
    y: float


def judge(prompt: str, image: NDArray[np.uint8]) -> dict[str, bool]:
    """Decides for each attribute in `prompt` whether `image` has it.

    For "a large red circle left of a small blue square" the keys of the result are "red", "red circle", "large red",
    "blue", "blue square", "small blue" and "red left of blue".

    Args:
        prompt: a caption of the world.
        image: uint8 RGB of shape (SIZE, SIZE, 3).

    Raises:
        ValueError: `prompt` is not a caption of the world, or `image` has another shape or dtype.
    """
    return judge_all([prompt], np.asarray(image)[None])[0]


def score(prompt: str, image: NDArray[np.uint8]) -> float:
    """Returns the share of the prompt's attributes that `image` has; 1.0 means all. Raises as `judge`."""
    return float(np.mean(list(judge(prompt, image).values())))


def score_all(prompts: Sequence[str], images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the `score` of n prompts with n pictures (n, SIZE, SIZE, 3) as float64 (n,)."""
    return np.array([np.mean(list(entries.values())) for entries in judge_all(prompts, images)])


def judge_all(prompts: Sequence[str], images: NDArray[np.uint8]) -> list[dict[str, bool]]:
    """Returns the result of `judge` for n prompts with n pictures (n, SIZE, SIZE, 3), vectorised; raises as `judge`."""
    images = np.asarray(images)
    if images.shape != (len(prompts), SIZE, SIZE, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"image must be uint8 of shape ({SIZE}, {SIZE}, 3), one per prompt, "
            f"got {images.dtype} {images.shape} for {len(prompts)} prompts"
        )
    descriptions = [parse(prompt) for prompt in prompts]
    rows = [row for row, description in enumerate(descriptions) for _ in description.things]
    colours = [thing.colour for description in descriptions for thing in description.things]
    findings = iter(find(images, rows, colours))
    return [_entries(description, [next(findings) for _ in description.things]) for description in descriptions]


def find(images: NDArray[np.uint8], rows: Sequence[int], colours: Sequence[str]) -> list[Finding]:
    """Looks for the thing of colour `colours[i]` in `images[rows[i]]`.

    Args:
        images: uint8 (n, SIZE, SIZE, 3).
        rows: m indices into `images`.
        colours: m keys of `COLOURS`.

    Returns:
        m findings.
    """
    if not rows:
        return []
    names = list(COLOURS)
    alpha = segment(images)[np.asarray(rows), :, :, [names.index(colour) for colour in colours]]
    everywhere = alpha.sum((1, 2))
    alpha = alpha * _fullest_window(alpha)
    area = alpha.sum((1, 2))
    core = (alpha > 0.6).sum((1, 2))
    ticks = np.arange(SIZE, dtype=np.float32) + 0.5
    safe = np.maximum(area, 1e-6)
    x, y = (alpha.sum(1) @ ticks) / safe, (alpha.sum(2) @ ticks) / safe
    present = (core >= MIN_CORE) & (area >= AREA_RANGE[0]) & (area >= MIN_SHARE * everywhere)
    overlap = np.zeros((len(rows), len(SHAPES)), np.float32)
    for column, shape in enumerate(SHAPES):
        template = coverage(shape, x[present], y[present], area[present])
        shared = np.minimum(alpha[present], template).sum((1, 2))
        overlap[present, column] = shared / np.maximum(alpha[present], template).sum((1, 2))
    best = overlap.argmax(1)
    fits = overlap.max(1) >= MIN_OVERLAP
    sizes = np.where(area > AREA_RANGE[1], "", np.where(area > SMALL_LARGE, "large", "small"))
    return [
        Finding(bool(there), SHAPES[kind] if fit else "", str(size) if there else "", float(px), float(py))
        for there, kind, fit, size, px, py in zip(present, best, fits, sizes, x, y, strict=True)
    ]


def segment(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Computes how much of each colour each pixel contains.

    Args:
        images: uint8 (n, SIZE, SIZE, 3).

    Returns:
        float32 (n, SIZE, SIZE, number of colours) in 0..1; at most one colour per pixel is non-zero.
    """
    pixels = images.reshape(len(images), -1, 3).astype(np.float32)
    background = np.median(pixels, axis=1, keepdims=True)  # things cover less than half of every picture
    offset = pixels - background
    toward = np.array(list(COLOURS.values()), np.float32) - background  # (n, colours, 3)
    along = offset @ toward.swapaxes(1, 2)
    alpha = np.clip(along / (toward**2).sum(-1)[:, None], 0, 1)
    lengths = np.linalg.norm(offset, axis=-1)[..., None] * np.linalg.norm(toward, axis=-1)[:, None]
    cosine = along / np.maximum(lengths, 1e-6)
    own = (cosine == cosine.max(-1, keepdims=True)) & (cosine >= MIN_COSINE) & (alpha >= MIN_ALPHA)
    return np.where(own, alpha, 0).reshape(len(images), SIZE, SIZE, len(COLOURS)).astype(np.float32)


def _fullest_window(alpha: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns masks, one for each of m maps (m, SIZE, SIZE), of the WINDOW x WINDOW square with the largest sum."""
    total = np.pad(alpha.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    sums = total[:, WINDOW:, WINDOW:] - total[:, :-WINDOW, WINDOW:] - total[:, WINDOW:, :-WINDOW]
    sums = sums + total[:, :-WINDOW, :-WINDOW]
    top, left = np.unravel_index(sums.reshape(len(sums), -1).argmax(1), sums.shape[1:])
    ticks = np.arange(SIZE)
    inside = [(ticks >= start[:, None]) & (ticks < start[:, None] + WINDOW) for start in (top, left)]
    return inside[0][:, :, None] & inside[1][:, None, :]


def _entries(description: Description, findings: list[Finding]) -> dict[str, bool]:
    entries = {}
    for thing, found in zip(description.things, findings, strict=True):
        entries[thing.colour] = found.present
        entries[f"{thing.colour} {thing.shape}"] = found.present and found.shape == thing.shape
        entries[f"{thing.size} {thing.colour}"] = found.present and found.size == thing.size
    if description.relation:
        first, second = description.things
        holds = all(found.present for found in findings) and _relation(*findings) == description.relation
        entries[f"{first.colour} {description.relation} {second.colour}"] = holds
    return entries


def _relation(first: Finding, second: Finding) -> str:
    """Returns the relation of two things along the axis of their larger offset, or "" if they are at the same place."""
    dx, dy = second.x - first.x, second.y - first.y
    if max(abs(dx), abs(dy)) < MIN_OFFSET:
        return ""
    left, right, above, below = RELATIONS
    if abs(dx) > abs(dy):
        return left if dx > 0 else right
    return above if dy > 0 else below
