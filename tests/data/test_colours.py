"""Embedded profiles against float64 references, their effect on cache keys, and images without usable profiles."""

from __future__ import annotations

import hashlib
import io
import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from seppo_fast.data.media import colours
from seppo_fast.data.media.images import bytes_ref, decode_image, is_converted, load_image
from seppo_fast.data.scan import decode_all
from seppo_fast.data.sources import open_source
from tests.helpers.cache import FakeEncoder, direct, opened
from tests.helpers.pictures import encoded, pixels, png_with, write_metadata
from tests.helpers.profiles import (
    DISPLAY_P3,
    P3_PROFILE,
    SRGB_PROFILES,
    cmyk_profile,
    encode,
    gamma,
    gray_profile,
    in_srgb,
    lab_in_srgb,
    rgb_profile,
)
from tests.helpers.tars import member, write_tar

SIDE = 24
PICTURE = pixels(1, SIDE, SIDE)
IN_SRGB = in_srgb(PICTURE, DISPLAY_P3)
GRAY = pixels(2, SIDE, SIDE)[..., 0]
LINEAR_GRAY = gray_profile(gamma())
LINEAR_IN_SRGB = np.repeat(255 * encode(GRAY / 255.0)[..., None], 3, axis=2)
ALPHA = pixels(3, SIDE, SIDE)[..., 0]


def load(content: bytes) -> np.ndarray:
    return load_image(bytes_ref("x", lambda: content), SIDE)


def assert_near(content: bytes, expected: np.ndarray, tolerance: float = 1.0) -> None:
    assert np.abs(load(content) - expected).max() <= tolerance
    assert is_converted(io.BytesIO(content))


def over_white(levels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return share * levels + (1 - share) * 255


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_display_p3(kind, options):
    assert np.abs(IN_SRGB - PICTURE).max() > 40
    assert_near(encoded(PICTURE, kind, icc_profile=P3_PROFILE, **options), IN_SRGB)


def test_a_jpeg_is_converted_after_it_is_decoded():
    seen = load(encoded(PICTURE, "JPEG", quality=100))
    assert_near(encoded(PICTURE, "JPEG", quality=100, icc_profile=P3_PROFILE), in_srgb(seen, DISPLAY_P3))
    # a profile split over many segments
    large = rgb_profile(DISPLAY_P3, gamma(2.2), zzzz=bytes(200_000))
    assert_near(encoded(PICTURE, "JPEG", quality=100, icc_profile=large), in_srgb(seen, DISPLAY_P3, lambda x: x**2.2))


def test_a_curve_and_the_turn():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(PICTURE, "PNG", icc_profile=rgb_profile(DISPLAY_P3, gamma(1.8)), exif=exif)
    assert_near(content, np.rot90(in_srgb(PICTURE, DISPLAY_P3, lambda x: x ** (round(1.8 * 256) / 256)), -1))


def test_alpha_is_not_converted():
    rgba = Image.fromarray(np.dstack([PICTURE, ALPHA]))
    for kind in ("PNG", "TIFF"):
        assert_near(encoded(rgba, kind, icc_profile=P3_PROFILE), over_white(IN_SRGB, ALPHA))
    la = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(ALPHA)))
    assert_near(encoded(la, icc_profile=LINEAR_GRAY), over_white(LINEAR_IN_SRGB, ALPHA))
    # one colour is marked as transparent
    keyed = encoded(PICTURE, "PNG", icc_profile=P3_PROFILE, transparency=tuple(PICTURE[3, 5].tolist()))
    expected = IN_SRGB.copy()
    expected[3, 5] = 255
    assert_near(keyed, expected)


def test_palettes():
    palette = Image.fromarray(PICTURE).quantize(16)
    levels = np.asarray(palette.convert("RGB"))
    assert_near(encoded(palette, icc_profile=P3_PROFILE), in_srgb(levels, DISPLAY_P3))
    expected = in_srgb(levels, DISPLAY_P3)
    expected[np.asarray(palette) == 3] = 255
    assert_near(encoded(palette, icc_profile=P3_PROFILE, transparency=3), expected)


def test_linear_gray():
    assert np.abs(LINEAR_IN_SRGB - GRAY[..., None]).max() > 70
    for kind in ("PNG", "TIFF"):
        assert_near(encoded(Image.fromarray(GRAY), kind, icc_profile=LINEAR_GRAY), LINEAR_IN_SRGB)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    seen = load_image(bytes_ref("x", lambda: encoded(Image.fromarray(ramp), icc_profile=LINEAR_GRAY)), 16)
    np.testing.assert_allclose(seen[..., 0], 255 * encode(ramp / 255.0), atol=1)  # holds in the dark range too


def test_linear_gray_of_16_bits():
    deep = np.random.default_rng(6).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
    deep[:2] = np.linspace(0, 3000, 2 * SIDE).astype(np.uint16).reshape(2, SIDE)
    expected = np.repeat(255 * encode(deep / 65535.0)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF"):
        content = encoded(Image.fromarray(deep), kind, icc_profile=LINEAR_GRAY)
        assert np.abs(load(content)[2:] - expected[2:]).max() <= 1
        assert_near(content, expected, 4)  # the curve is interpolated linearly between the two darkest of 256 levels


def test_cmyk_with_a_profile_of_its_own():
    """At the corners of ink or no ink the profile states the colour directly; the plain formula is far off."""
    corners = np.random.default_rng(0).integers([120, 118, 118], [200, 138, 138], (2, 2, 2, 2, 3))
    corners[..., 1, :] = 0, 128, 128  # black ink is black and paper white: littlecms would shift other values there
    corners[0, 0, 0, 0] = 255, 128, 128
    inks = np.random.default_rng(1).integers(0, 2, (SIDE, SIDE, 4))
    image = Image.fromarray((255 * inks).astype(np.uint8), "CMYK")
    expected = np.array([[lab_in_srgb(corners[tuple(ink)]) for ink in row] for row in inks])
    content = encoded(image, "TIFF", icc_profile=cmyk_profile(corners))
    assert np.abs(expected - load(encoded(image, "TIFF"))).max() > 100
    assert_near(content, expected, 2)


@pytest.mark.parametrize("case", SRGB_PROFILES)
def test_an_srgb_profile_changes_nothing(case):
    profile = SRGB_PROFILES[case]
    for image in (Image.fromarray(PICTURE), Image.fromarray(np.dstack([PICTURE, ALPHA]))):
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
            content = encoded(image, kind, icc_profile=profile, **options)
            np.testing.assert_array_equal(load(content), load(encoded(image, kind, **options)))
            assert not is_converted(io.BytesIO(content))


def test_the_srgb_profile_of_littlecms_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(PICTURE, icc_profile=profile)
    np.testing.assert_array_equal(load(content), PICTURE)
    assert not is_converted(io.BytesIO(content))


CMYK = Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))
OTHERS = {
    "empty": (PICTURE, b""),
    "no profile": (PICTURE, b"no profile"),
    "cut": (PICTURE, P3_PROFILE[:200]),
    "of no space": (PICTURE, P3_PROFILE[:16] + b"XXXX" + P3_PROFILE[20:]),
    "without curves": (PICTURE, P3_PROFILE.replace(b"TRC", b"XXX")),
    "of gray": (PICTURE, LINEAR_GRAY),
    "of RGB": (Image.fromarray(GRAY), P3_PROFILE),
    "of RGB, in CMYK": (CMYK, P3_PROFILE),
    "of CMYK": (PICTURE, cmyk_profile(np.full((2, 2, 2, 2, 3), 128))),
    "of bits": (Image.fromarray(GRAY > 99), LINEAR_GRAY),
}


@pytest.mark.parametrize("case", OTHERS)
def test_broken_profiles_and_those_of_other_pictures_are_ignored(case):
    image, profile = OTHERS[case]
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    for kind in ("TIFF",) if image.mode == "CMYK" else ("PNG", "TIFF"):
        content = encoded(image, kind, icc_profile=profile)
        np.testing.assert_array_equal(load(content), load(encoded(image, kind)))
        assert not is_converted(io.BytesIO(content))


def test_a_profile_larger_than_pillow_reads():
    content = encoded(
        PICTURE, icc_profile=rgb_profile(DISPLAY_P3, gamma(), zzzz=np.random.default_rng(0).bytes(1_500_000))
    )
    assert_near(content, in_srgb(PICTURE, DISPLAY_P3, lambda levels: levels))


def test_a_profile_that_is_a_bomb_takes_no_memory():
    content = png_with(b"iCCP", b"x\0\0" + zlib.compress(bytes(400_000_000), 9))
    tracemalloc.start()
    np.testing.assert_array_equal(load(content), PICTURE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_threads_may_share_a_conversion(tmp_path):
    squares = [pixels(seed, SIDE, SIDE) for seed in range(60)]
    for number, square in enumerate(squares):
        (tmp_path / f"{number:02d}.png").write_bytes(encoded(square, icc_profile=P3_PROFILE))
        (tmp_path / f"{number:02d}.txt").write_text("a fox")
    outcomes = decode_all(open_source(str(tmp_path)), lambda _, name, stream: np.asarray(decode_image(name, stream)))
    for (_, outcome), square in zip(outcomes, squares, strict=True):
        assert np.abs(outcome[0] - in_srgb(square, DISPLAY_P3)).max() <= 1


# keys


def test_keys_of_folders_and_shards_change_where_pixels_do(tmp_path):
    contents = {
        "plain.png": encoded(PICTURE),
        "srgb.png": encoded(PICTURE, icc_profile=SRGB_PROFILES["table"]),
        "broken.jpg": encoded(PICTURE, "JPEG", icc_profile=b"none"),
        "p3.jpg": encoded(PICTURE, "JPEG", icc_profile=P3_PROFILE),
        "p3.png": encoded(PICTURE, icc_profile=P3_PROFILE),
        "p3.webp": encoded(PICTURE, "WEBP", icc_profile=P3_PROFILE),
        "plain.webp": encoded(PICTURE, "WEBP", exif=b"Exif\0\0garbage"),
        "gray.png": encoded(Image.fromarray(GRAY), icc_profile=LINEAR_GRAY),
    }
    for name, content in contents.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a fox")
        suffix = " in sRGB" if name.startswith(("p3", "gray")) else ""
        hexadecimal = hashlib.sha256(content).hexdigest()
        expected = hashlib.sha256(json.dumps([name, "a fox", hexadecimal + suffix]).encode()).hexdigest()
        assert open_source(str(folder)).digest() == expected, name
        write_metadata(folder, [{"file_name": name, "text": "a fox"}])
        assert open_source(str(folder)).digest() == expected, name
        shard = write_tar(tmp_path / "s.tar", [member(name, content), member(f"{Path(name).stem}.txt", b"a fox")])
        expected = hashlib.sha256(json.dumps([f"s.tar/{name}", "a fox", hexadecimal + suffix]).encode()).hexdigest()
        assert open_source(str(shard)).digest() == expected, name


def test_tables_are_converted_and_have_keys_of_their_own(tmp_path, monkeypatch):
    cells = [encoded(PICTURE, icc_profile=P3_PROFILE), encoded(PICTURE)]
    pq.write_table(pa.table({"image": cells, "text": ["a", "b"]}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    assert np.abs(load_image(source[0].image, SIDE) - IN_SRGB).max() <= 1
    np.testing.assert_array_equal(load_image(source[1].image, SIDE), PICTURE)
    converted = source.digest()
    monkeypatch.setattr(colours.features, "check", lambda _: False)
    assert open_source(str(tmp_path / "x.parquet")).digest() != converted


def test_the_cache_holds_what_is_seen(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for name, options in {"a": {"icc_profile": P3_PROFILE}, "b": {}}.items():
        (folder / f"{name}.png").write_bytes(encoded(PICTURE, **options))
        (folder / f"{name}.txt").write_text("a fox")
    source = open_source(str(folder))
    cache = opened(source, tmp_path / "cache")
    for row in (0, 1):
        assert (cache.winners([row])[0] == direct(source[row].image, FakeEncoder())).all()
    assert (cache.winners([0]) != cache.winners([1])).any()


def test_without_littlecms_pictures_are_taken_as_they_are(tmp_path, monkeypatch):
    content = encoded(PICTURE, icc_profile=P3_PROFILE)
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.txt").write_text("a fox")
    with_it = open_source(str(tmp_path)).digest()
    monkeypatch.setattr(colours.features, "check", lambda _: False)
    colours._conversion.cache_clear()
    np.testing.assert_array_equal(load(content), PICTURE)
    plain = json.dumps(["a.png", "a fox", hashlib.sha256(content).hexdigest()])
    assert open_source(str(tmp_path)).digest() == hashlib.sha256(plain.encode()).hexdigest() != with_it
    colours._conversion.cache_clear()
