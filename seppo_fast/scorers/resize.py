"""Resizes pictures as the published scorers' own code does, with PIL and torch, without torchvision.

The functions accept uint8 arrays, so scores do not depend on how files are decoded. Pictures are resized in a few
threads, since PIL and torch release the interpreter's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's, BLIP's too
THREADS = min(8, os.cpu_count() or 1)

T = TypeVar("T")


def shorter_side(pictures: np.ndarray, size: int, *, rounded: bool = False, threads: int = THREADS) -> Tensor:
    """Resizes the shorter side to `size` with PIL's bicubic filter, and crops the center.

    Args:
        pictures: `(N, H, W, 3)` uint8.
        size: the side of the result in pixels.
        rounded: whether half pixels of the crop's offset are rounded to even, as torchvision's `CenterCrop` does
            (ImageReward, the original CLIP), or down, as transformers does (PickScore).
        threads: the most threads to use; the result does not depend on it.

    Returns:
        `(N, 3, size, size)` float32 in [0, 1].
    """

    def resized(picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        short = min(height, width)
        # Both libraries truncate the longer side.
        new_height, new_width = (size if side == short else int(size * side / short) for side in (height, width))
        image = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BICUBIC)
        top, left = (round(m / 2) if rounded else m // 2 for m in (new_height - size, new_width - size))
        return np.asarray(image.crop((left, top, left + size, top + size)))

    return _unit_range(np.stack(_in_threads(resized, pictures, threads)))


def longest_side_padded(pictures: np.ndarray, size: int, *, threads: int = THREADS) -> Tensor:
    """Resizes the longest side to `size` and pads with black to a square, as HPSv2's preprocessing does.

    Bicubic, on the float tensor, so values may leave [0, 1] slightly. `antialias=True` is part of the definition here:
    in the original it depends on the version of torchvision (on since 0.17), and so do the scores. The picture is
    centered; an odd margin leaves the extra row or column at the bottom or right.

    The original does not pad a picture whose longest side is `size` already, and fails on it unless it is square; here
    it is padded like any other.

    Source: tgxs002/HPSv2 866735e, `ResizeMaxSize` in `hpsv2/src/open_clip/transform.py`.

    Args:
        pictures: `(N, H, W, 3)` uint8.
        size: the side of the result in pixels.
        threads: the most threads to use; the result does not depend on it.

    Returns:
        `(N, 3, size, size)` float32.
    """

    def resized(picture: np.ndarray) -> Tensor:
        image = _unit_range(picture[None])
        sides = image.shape[-2:]
        new = [max(1, round(side * size / max(sides))) for side in sides]
        if list(sides) != new:
            image = interpolate(image, size=new, mode="bicubic", align_corners=False, antialias=True)
        top, left = ((size - side) // 2 for side in new)
        return pad(image, (left, size - new[1] - left, top, size - new[0] - top))

    return torch.cat(_in_threads(resized, pictures, threads))


def normalized(pictures: Tensor) -> Tensor:
    """Returns pictures `(N, 3, H, W)` in [0, 1] minus CLIP's mean, divided by its standard deviation."""
    mean, std = (torch.tensor(values, device=pictures.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pictures - mean) / std


def _unit_range(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255


def _in_threads(work: Callable[[np.ndarray], T], pictures: np.ndarray, threads: int) -> list[T]:
    with ThreadPoolExecutor(min(threads, len(pictures))) as pool:
        return list(pool.map(work, pictures))
