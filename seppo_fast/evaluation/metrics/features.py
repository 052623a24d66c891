"""Feature functions for distances of distributions: uint8 pictures or clips to `(N, D)` float32, in batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from seppo_fast.config.schema import did_you_mean
from seppo_fast.evaluation.metrics import i3d, inception
from seppo_fast.evaluation.metrics.networks import in_batches
from seppo_fast.shapes.judge import WINDOW, find, segment
from seppo_fast.shapes.world import COLOURS, RELATIONS, SHAPES, SIZE, SIZES
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.imports import import_function

FeatureFunction = Callable[[np.ndarray], np.ndarray]

JUDGE = "judge"
NETWORKS = ("inception", "inception-clean", "i3d")  # these need a file of weights
JUDGE_NAMES = (
    *COLOURS,
    *SHAPES,
    "no shape",
    *SIZES,
    "extent",
    "x",
    "y",
    *RELATIONS,
    "background red",
    "background green",
    "background blue",
    "stray colour",
    "background noise",
)
_BATCH = 64  # pictures, or frames of clips, per pass; a batch of Inception needs about 1 GiB


def load_features(name: str, weights: Path | None, device: torch.device, batch: int = _BATCH) -> FeatureFunction:
    """Returns the feature function with this name.

    Args:
        name: `judge` (the embedded worlds), `inception` (FID, KID), `inception-clean` (clean-FID's resizing), `i3d`
            (FVD), or `module:function`: called with all pictures, it returns features `(N, D)`.
        weights: the safetensors file of a network's weights; None for the others.
        device: the network's device.
        batch: pictures per pass, or frames of clips.

    Raises:
        ConfigError: the name is unknown, cannot be imported or called, or the weights cannot be loaded.
    """
    if name == JUDGE:
        return judge_features
    if name not in NETWORKS:
        return _imported(name)
    if weights is None:
        raise ConfigError(f"features {name!r} need a file of weights; docs/metrics.md says where to get it")
    if name == "i3d":
        network = i3d.load_i3d(weights, device)
        return lambda clips: in_batches(partial(i3d.features, network), clips, max(1, batch // clips.shape[1]))
    pictured = partial(inception.features, inception.load_inception(weights, device), clean=name.endswith("clean"))
    return lambda pictures: in_batches(pictured, pictures, batch)


def read_features(file: Path) -> np.ndarray:
    """Reads features `(N, D)` that another program computed, as float32.

    Args:
        file: a `.npy` file, or a `.safetensors` file with a single tensor.

    Raises:
        DataError: the file is missing, a pickle or malformed, or does not hold finite features `(N, D)`.
    """
    try:
        if file.suffix == ".npy":
            rows = np.load(file)  # never a pickle: that is its default
        elif file.suffix == ".safetensors":
            (rows,) = (tensor.float().numpy() for tensor in load_file(file).values())
        else:
            raise ValueError("only .npy and .safetensors are read, because pickles can run code; convert it")
        rows = np.asarray(rows, dtype=np.float32)
    except (OSError, ValueError, TypeError, SafetensorError) as problem:
        raise DataError(f"{file}: features cannot be read ({problem})") from problem
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise DataError(f"{file}: expected finite features (N, D), got shape {rows.shape}")
    return rows


def judge_features(pictures: np.ndarray) -> np.ndarray:
    """Measures pictures of the embedded worlds with the exact judge; no network is used.

    `JUDGE_NAMES` names the features of a picture. They are: whether each colour is found; the number of things of each
    shape, without a known shape, and of each size; the things' mean extent (square root of the area, in 10 pixels) and
    mean place (in sides, from the middle); the relation of the first two things in the colours' order; the background's
    colour; and two measures of what no thing explains, the share of coloured pixels outside all things and the mean
    absolute deviation of the background, each times 10. All are of order 1, so no single one dominates a distance. They
    do not depend on a prompt.

    Args:
        pictures: `(N, 32, 32, 3)` uint8, or clips `(N, F, 32, 32, 3)`, F at least 2.

    Returns:
        `(N, D)` float32, finite for any input. For clips, the mean over the frames, then the last frame minus the
        first.

    Raises:
        ValueError: `pictures` has another shape or dtype.
    """
    pictures = np.asarray(pictures)
    clip = pictures.ndim == 5
    if pictures.shape[-3:] != (SIZE, SIZE, 3) or pictures.ndim not in (4, 5) or pictures.dtype != np.uint8:
        raise ValueError(
            f"pictures: expected uint8 (N, {SIZE}, {SIZE}, 3) or (N, F, {SIZE}, {SIZE}, 3), got {pictures.dtype} "
            f"{pictures.shape}"
        )
    if clip and pictures.shape[1] < 2:
        raise ValueError(f"pictures: clips need at least 2 frames, got {pictures.shape[1]}")
    measured = in_batches(_measured, pictures.reshape(-1, SIZE, SIZE, 3), _BATCH)
    if not clip:
        return measured
    frames = measured.reshape(*pictures.shape[:2], -1)
    return np.concatenate([frames.mean(axis=1), frames[:, -1] - frames[:, 0]], axis=1)


def _measured(pictures: np.ndarray) -> np.ndarray:
    """Returns the features of a batch of pictures, `(N, len(JUDGE_NAMES))` float32."""
    alphas = segment(pictures)  # (N, SIZE, SIZE, colours)
    rows = [row for row in range(len(pictures)) for _ in COLOURS]
    found = iter(find(pictures, rows, [colour for _ in pictures for colour in COLOURS]))
    ticks = np.arange(SIZE) + 0.5
    table = np.zeros((len(pictures), len(JUDGE_NAMES)), np.float32)
    for picture, alpha, values in zip(pictures, alphas, table):
        named = dict.fromkeys(JUDGE_NAMES, 0.0)
        explained = np.zeros((SIZE, SIZE), bool)
        things = []
        for place, colour in enumerate(COLOURS):
            thing = next(found)
            if not thing.present:
                continue
            near = (abs(ticks - thing.y) <= WINDOW / 2)[:, None] & (abs(ticks - thing.x) <= WINDOW / 2)
            explained |= near & (alpha[..., place] > 0)
            things.append((thing.x / SIZE - 0.5, thing.y / SIZE - 0.5, float(alpha[near, place].sum()) ** 0.5 / 10))
            named[colour] = 1.0
            named[thing.shape or "no shape"] += 1
            if thing.size:
                named[thing.size] += 1
        if things:
            named["x"], named["y"], named["extent"] = np.mean(things, axis=0)
        if len(things) > 1:
            named[_relation(things[0], things[1])] = 1.0
        named |= _unexplained(picture, alpha.sum(axis=-1), explained)
        values[:] = list(named.values())
    return table


def _relation(first: tuple[float, float, float], second: tuple[float, float, float]) -> str:
    left, right, above, below = RELATIONS
    dx, dy = second[0] - first[0], second[1] - first[1]
    if abs(dx) > abs(dy):
        return left if dx > 0 else right
    return above if dy > 0 else below


def _unexplained(picture: np.ndarray, coloured: np.ndarray, explained: np.ndarray) -> dict[str, float]:
    """Returns the background's colour, and what is neither background nor a thing."""
    background = np.median(picture.reshape(-1, 3), axis=0)
    empty = coloured == 0
    noise = np.abs(picture[empty] - background).mean() if empty.any() else 255.0
    return {
        **{f"background {name}": float(value) / 255 for name, value in zip(("red", "green", "blue"), background)},
        "stray colour": 10 * float(coloured[~explained].sum()) / SIZE**2,
        "background noise": 10 * float(noise) / 255,
    }


def _imported(name: str) -> FeatureFunction:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        known = (JUDGE, *NETWORKS)
        raise ConfigError(
            f"features {name!r} are unknown{did_you_mean(name, known)}; give {', '.join(known)} or module:function"
        )
    return partial(_checked, name, import_function(name, f"features {name!r}"))


def _checked(name: str, function: Callable[[np.ndarray], object], pictures: np.ndarray) -> np.ndarray:
    features = np.asarray(function(pictures), dtype=np.float32)
    if features.ndim != 2 or len(features) != len(pictures):
        raise ConfigError(f"features {name!r} returned shape {features.shape} for {len(pictures)} pictures, not (N, D)")
    return features
