"""Builds ICC profiles byte by byte, and computes in float64 what a picture with one looks like in sRGB."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = np.array([0.3127 / 0.3290, 1.0, (1 - 0.3127 - 0.3290) / 0.3290])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_d50(*chromaticities: tuple[float, float]) -> np.ndarray:
    """Returns the matrix from linear RGB with primaries at these (x, y), under D65, to XYZ under D50."""
    primaries = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in chromaticities]).T
    adaptation = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD
    return adaptation @ (primaries * np.linalg.solve(primaries, D65))


SRGB = to_d50((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = to_d50((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))


def decode(encoded: np.ndarray) -> np.ndarray:
    """Converts sRGB levels between 0 and 1 to linear light."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def encode(linear: np.ndarray) -> np.ndarray:
    """Converts linear light to sRGB levels, after clipping it to [0, 1]; the inverse of `decode`."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(levels: np.ndarray, matrix: np.ndarray, curve: Callable[[np.ndarray], np.ndarray] = decode) -> np.ndarray:
    """Converts uint8 (..., 3) in a space with this matrix and curve to unrounded sRGB levels (..., 3), 0 to 255."""
    linear = curve(levels / 255.0) @ (np.linalg.inv(SRGB) @ matrix).T
    return 255 * encode(linear)


def lab_in_srgb(lab: tuple[int, int, int]) -> np.ndarray:
    """Converts a colour in 8-bit Lab under D50 to unrounded sRGB levels (3,), 0 to 255."""
    y = (lab[0] * 100 / 255 + 16) / 116
    cubes = np.array([y + (lab[1] - 128) / 500, y, y - (lab[2] - 128) / 200])
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * D50
    return 255 * encode(np.linalg.inv(SRGB) @ xyz)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma(exponent: float | None = None) -> bytes:
    """Returns a curve: a power, or without an exponent the identity."""
    return b"curv\0\0\0\0" + (
        struct.pack(">I", 0) if exponent is None else struct.pack(">IH", 1, round(exponent * 256))
    )


def table(levels: np.ndarray) -> bytes:
    """Returns a curve through points between 0 and 1."""
    points = np.round(65535 * levels).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(points)) + points.tobytes()


SRGB_CURVE = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def profile(space: bytes, tags: dict[bytes, bytes], device: bytes = b"mntr", connection: bytes = b"XYZ ") -> bytes:
    """Returns a profile of version 2.4 with these tags and the ones that every profile needs."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50),
        **tags,
    }
    listing, content, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        listing += name + struct.pack(">II", start + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s6H4s", start + len(content), b"test", 0x02400000, device, space, connection,
                       2024, 1, 1, 0, 0, 0, b"acsp")  # fmt: skip
    head += bytes(28) + fixed(*D50)
    return head + bytes(128 - len(head)) + listing + content


def rgb_profile(matrix: np.ndarray, curve: bytes, **more: bytes) -> bytes:
    columns = {name: b"XYZ \0\0\0\0" + fixed(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return profile(b"RGB ", columns | curves | {name.encode(): content for name, content in more.items()})


def gray_profile(curve: bytes) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve})


def cmyk_profile(corners: np.ndarray) -> bytes:
    """Returns a profile that interpolates 8-bit Lab colours (2, 2, 2, 2, 3), of no and full C, M, Y and K."""
    straight = np.arange(256, dtype=np.uint8).tobytes()
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += 4 * straight + corners.astype(np.uint8).tobytes() + 3 * straight
    return profile(b"CMYK", {b"A2B0": lut}, b"prtr", b"Lab ")


P3_PROFILE = rgb_profile(DISPLAY_P3, SRGB_CURVE)
SRGB_PROFILES = {
    "parametric": rgb_profile(SRGB, SRGB_CURVE),
    "table": rgb_profile(SRGB, table(decode(np.arange(1024) / 1023))),
    "coarse table": rgb_profile(SRGB, table(decode(np.arange(64) / 63))),
    # the primaries as rounded in Hewlett-Packard's profile, which most files have
    "rounded": rgb_profile(
        np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]),
        table(decode(np.arange(1024) / 1023)),
    ),
}
