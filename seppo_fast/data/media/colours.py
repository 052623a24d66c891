"""Converts images with an embedded ICC profile to sRGB, the colour space that models are trained on.

RGB, gray and CMYK profiles are applied. A profile that is broken, is for another colour mode than the image, or differs
from sRGB by rounding only is ignored: such an image keeps the pixels that it would have without a profile.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image, ImageCms, features

_SPACES = {"RGB": b"RGB ", "RGBA": b"RGB ", "L": b"GRAY", "LA": b"GRAY", "CMYK": b"CMYK"}
_TOLERANCE = 2  # of 255 levels: small sRGB profiles approximate the sRGB curve by a few points
_SHARED, _FINE, _EXACT = 0x40, 0x400, 0x100
"""Flags of littlecms: no cache (threads may share a transform); finer precalculated steps; no precalculation."""

Conversion = Callable[[Image.Image], Image.Image]


def can_convert() -> bool:
    """Returns whether this Pillow was built with littlecms, which applies profiles."""
    return bool(features.check("littlecms2"))


def converts(mode: str, profile: object) -> bool:
    """Returns whether this profile changes the pixels of an image that Pillow opens in this mode."""
    plain = {"P": "RGB", "PA": "RGBA"}.get(mode, "L" if mode.startswith("I;16") else mode)
    return isinstance(profile, bytes) and _conversion(plain, profile) is not None


def to_srgb(image: Image.Image, profile: object) -> Image.Image:
    """Returns an image of mode RGB, RGBA, L, LA or CMYK (as RGB) in sRGB.

    Images of other modes, or without an applicable profile, are returned unchanged.
    """
    conversion = _conversion(image.mode, profile) if isinstance(profile, bytes) else None
    return image if conversion is None else conversion(image)


def gray_to_srgb(levels: np.ndarray, profile: object) -> np.ndarray:
    """Converts uint16 gray levels to uint8: to sRGB if the profile changes them, else their upper byte."""
    curve = _gray_curve(profile) if isinstance(profile, bytes) else None
    if curve is None:
        return (levels >> 8).astype(np.uint8)
    return np.interp(levels, 257 * np.arange(256), curve).round().astype(np.uint8)


@lru_cache(maxsize=32)
def _conversion(mode: str, profile: bytes) -> Conversion | None:
    """Returns the conversion to sRGB of images with this mode and profile, or None if it is impossible or unneeded."""
    if profile[16:20] != _SPACES.get(mode) or not can_convert():
        return None
    if mode in ("L", "LA"):
        curve = _gray_curve(profile)
        return None if curve is None else partial(_follow, curve)
    transform = _transform(profile, mode, "RGBA" if mode == "RGBA" else "RGB", _FINE | _SHARED)
    if transform is None:
        return None
    if mode != "CMYK":
        steps = np.linspace(0, 255, 18).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 1, 3)
        probe = Image.fromarray(colours).convert(mode)
        if _alike(np.asarray(transform.apply(probe)), np.asarray(probe)):
            return None
    return transform.apply


def _follow(curve: np.ndarray, image: Image.Image) -> Image.Image:
    """Applies the curve to gray and leaves alpha unchanged."""
    return image.point([*curve.tolist(), *range(256)][: 256 * len(image.mode)])


@lru_cache(maxsize=32)
def _gray_curve(profile: bytes) -> np.ndarray | None:
    """Returns the sRGB level of each gray level, (256,) uint8, or None if impossible or unneeded."""
    if profile[16:20] != _SPACES["L"] or not can_convert():
        return None
    transform = _transform(profile, "L", "RGB", _EXACT)  # precalculation errs by ten levels where curves are steep
    if transform is None:
        return None
    levels = np.arange(256, dtype=np.uint8)
    curve = np.asarray(transform.apply(Image.fromarray(levels[None])))[0, :, 0]
    return None if _alike(curve, levels) else curve


def _transform(profile: bytes, mode: str, into: str, flags: Any) -> ImageCms.ImageCmsTransform | None:
    """Returns the transform from the profile to sRGB, or None if littlecms rejects the profile."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(opened, srgb, mode, into, ImageCms.Intent.PERCEPTUAL, flags)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None


def _alike(levels: np.ndarray, others: np.ndarray) -> bool:
    return bool(np.abs(levels.astype(int) - others).max() <= _TOLERANCE)
