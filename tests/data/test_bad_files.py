"""Every kind of file that a folder of images may hold yields the right pixels or the right reason, never a crash."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, PngImagePlugin

from benchmarks.harness.forks import ROOT
from seppo_fast.cli import main
from seppo_fast.data.media.images import load_image
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import FakeEncoder, opened
from tests.helpers.pictures import PICTURE, SIDE, encoded, header_only_png, png_with, with_wrong_crc


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 8  # displayed rotated by 90 degrees counterclockwise
    return encoded(PICTURE, exif=exif)


def transparent_palette() -> bytes:
    stripes = Image.fromarray(np.arange(SIDE, dtype=np.uint8)[None].repeat(SIDE, 0) % 2, "L").convert("P")
    stripes.putpalette([200, 10, 20, 30, 240, 50])
    return encoded(stripes, transparency=0)


def two_colours(even: tuple[int, int, int], odd: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.broadcast_to(odd if x % 2 else even, (SIDE, 3)) for x in range(SIDE)], 1).astype(np.uint8)


def gray(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, axis=2).astype(np.uint8)


def animation(kind: str, **options: object) -> bytes:
    """Returns an animation of a red and a blue frame."""
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], loop=0, **options)


def bomb() -> bytes:
    return encoded(Image.new("1", (9_000, 9_000)))


def gif_bomb() -> bytes:
    return encoded(Image.new("L", (9_000, 9_000)), "GIF")


def pixels_of(alpha: np.ndarray, level: int) -> np.ndarray:
    return gray(np.round(level * (alpha / 255.0) + 255 * (1 - alpha / 255.0)))


ALPHA = np.full((SIDE, SIDE), 255, np.uint8)
ALPHA[: SIDE // 2] = 0
LA = Image.merge("LA", (Image.new("L", (SIDE, SIDE), 90), Image.fromarray(ALPHA)))
DEEP = np.random.default_rng(6).integers(0, 65536, (SIDE, SIDE)).astype(np.uint16)
RED = two_colours((255, 0, 0), (255, 0, 0))
BITS = Image.fromarray(np.random.default_rng(3).random((SIDE, SIDE)) < 0.5)
JPEG = encoded(PICTURE, "JPEG")
WEBP = encoded(PICTURE, "WEBP", lossless=True)

# suffix, content, expected pixels of the whole image as a square of SIDE
GOOD: dict[str, tuple[str, Callable[[], bytes], np.ndarray]] = {
    "plain": ("png", lambda: encoded(PICTURE), PICTURE),
    "cmyk": ("jpg", lambda: encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG"), RED),
    "16 bits": ("png", lambda: encoded(Image.fromarray(DEEP)), gray(DEEP >> 8)),
    "transparent palette": ("png", transparent_palette, two_colours((255, 255, 255), (30, 240, 50))),
    "gray with alpha": ("png", lambda: encoded(LA), pixels_of(ALPHA, 90)),
    "1 bit": ("png", lambda: encoded(BITS), gray(np.asarray(BITS) * 255)),
    "turned": ("png", turned, np.rot90(PICTURE, 1)),
    "1 x 1": ("png", lambda: encoded(np.full((1, 1, 3), 9, np.uint8)), np.full((SIDE, SIDE, 3), 9)),
    "65000 x 1": ("png", lambda: encoded(np.full((1, 65_000, 3), 77, np.uint8)), np.full((SIDE, SIDE, 3), 77)),
    "1 x 65000": ("png", lambda: encoded(np.full((65_000, 1, 3), 78, np.uint8)), np.full((SIDE, SIDE, 3), 78)),
    "garbage for a profile": ("png", lambda: png_with(b"iCCP", b"sRGB\0\0" + b"no zlib"), PICTURE),
    "garbage in a profile": ("png", lambda: png_with(b"iCCP", b"sRGB\0\0" + zlib.compress(b"no profile")), PICTURE),
    "animated": ("webp", lambda: animation("WEBP", lossless=True), RED),
    "a GIF called PNG": ("png", lambda: animation("GIF"), RED),
    "a PNG called JPEG": ("jpg", lambda: encoded(PICTURE), PICTURE),
    # of the pixel data, which zlib protects by a checksum of its own
    "a wrong checksum": ("png", lambda: with_wrong_crc(encoded(PICTURE), b"IDAT"), PICTURE),
    "a text bomb": ("png", lambda: png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9)), PICTURE),
    "a large text": ("png", lambda: encoded(PICTURE, pnginfo=text_chunk("x" * 300_000, zip=True)), PICTURE),
}  # fmt: skip

# suffix, content, part of the reason (alternatives separated by |)
BAD: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "truncated JPEG": ("jpg", lambda: JPEG[: len(JPEG) // 2], "truncated or damaged"),
    "truncated PNG": ("png", lambda: encoded(PICTURE)[:700], "truncated or damaged"),
    "truncated WebP": ("webp", lambda: WEBP[: len(WEBP) // 2], "not an image|truncated or damaged"),
    "zero bytes": ("png", lambda: b"", "zero bytes"),
    "a web page": ("jpg", lambda: b"<!DOCTYPE html><html>404 not found</html>" * 9, "not an image"),
    "too many megapixels": ("png", lambda: header_only_png(40_000, 40_000), "too large"),
    "too many megapixels, JPEG": ("jpg", lambda: jpeg_of(65_000, 65_000), "too large"),
    "too many megapixels, WebP": ("webp", lambda: webp_of(16_383, 16_383), "too large|truncated or damaged"),
    "bomb": ("png", bomb, "9000 x 9000 is 81 megapixels"),
    "a GIF bomb": ("png", gif_bomb, "9000 x 9000 is 81 megapixels"),
    "a wrong header": ("png", lambda: with_wrong_crc(encoded(PICTURE), b"IHDR"), "not an image|damaged"),
    "a text without end": ("png", lambda: encoded(PICTURE)[:33] + b"\x7f\xff\xff\xfftEXt", "truncated or damaged"),
    "an SVG": ("png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "a pickle": ("png", lambda: b"\x80\x04\x95\0\0\0\0\0\0\0\0.", "not an image"),
    "PostScript": ("jpg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 24\n", "not an image"),
    "32-bit floats": ("png", lambda: encoded(Image.fromarray(np.ones((SIDE, SIDE), np.float32)), "TIFF"), "32-bit"),
}  # fmt: skip

# content of the caption file, expected prompt
GOOD_CAPTIONS: dict[str, tuple[bytes, str]] = {
    "byte order mark": ("\ufeffa fox".encode(), "a fox"),
    "control characters": (b"a\x07 fox\x1b[31m\x7f", "a\x07 fox\x1b[31m\x7f"),
    "only emoji": ("🦊🌲".encode(), "🦊🌲"),
    "right to left": ("שועל אדום \u202e".encode(), "שועל אדום \u202e"),
    "lines": (b"\r\n a red\r\nfox \n", "a red\r\nfox"),
    "longest": (b"x" * 65_536, "x" * 65_536),
}
BAD_CAPTIONS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "no caption: x.txt is missing"),
    "empty": (b"", "x.txt is empty"),
    "white space": ("\ufeff \t\r\n\u00a0".encode(), "x.txt is empty"),
    "NUL": (b"a\0fox", "x.txt holds NUL characters"),
    "not UTF-8": ("café".encode("latin-1"), "x.txt is not UTF-8 text"),
    "UTF-16": ("a fox".encode("utf-16"), "x.txt is not UTF-8 text"),
    "UTF-16 without a mark": ("a fox".encode("utf-16-le"), "x.txt holds NUL characters"),
    "half a character": (b"a \xed\xa0\x80 fox", "x.txt is not UTF-8 text"),
    "a megabyte": (b"x" * 1_000_000, "x.txt is longer than 65536 bytes: not a caption"),
}


def text_chunk(text: str, zip: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", text, zip=zip)
    return info


def jpeg_of(width: int, height: int) -> bytes:
    place = JPEG.index(b"\xff\xc0")
    return JPEG[: place + 5] + struct.pack(">HH", height, width) + JPEG[place + 9 :]


def webp_of(width: int, height: int) -> bytes:
    """Returns an extended WebP whose header declares a canvas of this size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + WEBP[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def one(folder: Path, suffix: str, content: bytes, caption: bytes | None = b"a fox") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"x.{suffix}").write_bytes(content)
    if caption is not None:
        (folder / "x.txt").write_bytes(caption)
    return folder


def refused(folder: Path, cache: Path, name: str) -> str:
    """Returns the only reason for which scan and cache refuse the folder's content."""
    (problem,) = scan(open_source(str(folder)))
    assert problem.id == name
    with pytest.raises(DataError) as caught:
        opened(open_source(str(folder)), cache)
    assert f"  {problem}" in str(caught.value).splitlines()
    assert caught.value.exit_code == 3
    assert list(cache.iterdir()) == []
    return problem.reason


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", GOOD)
def test_pictures_that_are_used(tmp_path, case):
    suffix, content, expected = GOOD[case]
    source = open_source(str(one(tmp_path / "d", suffix, content())))
    assert scan(source) == []
    tolerance = 4 if case == "cmyk" else 1
    np.testing.assert_allclose(load_image(source[0].image, SIDE).astype(int), expected, atol=tolerance)
    cache = opened(source, tmp_path / "cache")
    square = torch.from_numpy(load_image(source[0].image, 16).copy())[None]
    assert torch.equal(cache.winners([0]), FakeEncoder().encode_images(square))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD)
def test_pictures_that_are_refused(tmp_path, case):
    suffix, content, reason = BAD[case]
    folder = one(tmp_path / "d", suffix, content())
    told = refused(folder, tmp_path / "cache", f"x.{suffix}")
    assert any(part in told for part in reason.split("|")), told


@pytest.mark.parametrize("case", GOOD_CAPTIONS)
def test_captions_that_are_used(tmp_path, tiny, case):
    from transformers import CLIPTokenizer

    content, prompt = GOOD_CAPTIONS[case]
    source = open_source(str(one(tmp_path / "d", "png", encoded(PICTURE), content)))
    assert (scan(source), source[0].prompt) == ([], prompt)
    assert opened(source, tmp_path / "cache").prompts == [prompt]
    assert CLIPTokenizer.from_pretrained(tiny / "tokenizer")([prompt], truncation=True).input_ids


@pytest.mark.parametrize("case", BAD_CAPTIONS)
def test_captions_that_are_refused(tmp_path, case):
    content, reason = BAD_CAPTIONS[case]
    folder = one(tmp_path / "d", "png", encoded(PICTURE), content)
    assert reason in refused(folder, tmp_path / "cache", "x.png")


@pytest.mark.parametrize("case", ["NUL", "empty", "white space", "a megabyte"])
def test_captions_of_tables_and_listings_are_refused_alike(tmp_path, case):
    content, reason = BAD_CAPTIONS[case]
    text = content.decode("utf-8-sig")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.png").write_bytes(encoded(PICTURE))
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": text}))
    pq.write_table(pa.table({"image": [encoded(PICTURE)], "text": [text]}), tmp_path / "x.parquet")
    for spec in ("d", "x.parquet"):
        (problem,) = scan(open_source(str(tmp_path / spec)))
        assert reason.removeprefix("x.txt ") in problem.reason


def test_half_characters_in_json(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(PICTURE))
    lines = ['{"file_name": "x.png", "text": "\\ud83e fox"}', '{"file_name": "\\ud83e.png", "text": "fox"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(str(tmp_path))
    first, second = scan(source)
    assert "half a character" in first.reason
    assert "codec can't encode" in second.reason
    assert str(second).startswith("\\ud83e.png: ")
    assert source.digest()


# entries that are not regular files


def test_links_folders_pipes_and_names(tmp_path):
    folder = tmp_path / "d"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "round.png").symlink_to("round.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "told.txt")
    (folder / "told.png").write_bytes(encoded(PICTURE))
    (folder / "moving.gif").write_bytes(animation("GIF"))
    latin = os.fsdecode(b"caf\xe9")
    for name in ("folder", "nowhere", "round", "pipe", "endless", "moving", latin):
        (folder / f"{name}.txt").write_text("a fox")
    (folder / f"{latin}.png").write_bytes(b"no picture")
    source = open_source(str(folder))
    found = dict(str(problem).split(": ", 1) for problem in scan(source))
    expected = {
        "folder.txt": "a caption without an image",
        "nowhere.png": "missing",
        "round.png": "cannot be read",
        "pipe.png": "a device or a pipe",
        "endless.png": "a device or a pipe",
        "told.png": "told.txt cannot be read",
        "moving.txt": "moving.gif is none of .png, .jpg, .jpeg, .webp",
        "caf\\udce9.png": "not an image",
    }
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name]
    assert source.digest()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    folder = one(tmp_path / "d", "png", encoded(PICTURE))
    (folder / "x.png").chmod(0)
    assert "Permission denied" in refused(folder, tmp_path / "cache", "x.png")


# the command line


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_check_names_them_all_and_training_stops(tmp_path, tiny, capsys):
    folder, names = tmp_path / "d", {}
    folder.mkdir()
    for number, (suffix, content, _) in enumerate(BAD.values()):
        names[f"picture{number:02d}.{suffix}"] = content(), b"a fox"
    for number, (caption, _) in enumerate(BAD_CAPTIONS.values()):
        names[f"caption{number:02d}.png"] = encoded(PICTURE), caption
    good = {f"good{n:02d}.{suffix}": (content(), b"a fox") for n, (suffix, content, _) in enumerate(GOOD.values())}
    for name, (content, caption) in (names | good).items():
        (folder / name).write_bytes(content)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_bytes(caption)
    config = tmp_path / "run.yaml"
    tree = {
        "model": {"path": str(tiny), "precision": "fp32"}, "output": str(tmp_path / "run"),
        "data": {"source": str(folder), "resolution": 16, "cache": str(tmp_path / "cache")},
        "train": {"updates": 1, "pairs_per_update": 4}, "log": {"sample_every": 0},
    }  # fmt: skip
    config.write_text(json.dumps(tree))
    assert main(["check", str(config)]) == 3
    out = capsys.readouterr().out
    assert {line[5:].split(": ")[0] for line in out.splitlines() if line.startswith("bad: ")} == names.keys()
    assert f"data: {len(good) + len(names)} examples, {len(names)} bad" in out
    assert main(["train", str(config)]) == 3
    err = capsys.readouterr().err
    assert f"{len(names)} of {len(names) + len(good)} examples cannot be used, more than 1 %" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("count", "bad", "stops"), [(100, 1, False), (99, 1, True), (300, 3, False), (399, 4, True)])
def test_the_edge_of_one_percent(tmp_path, count, bad, stops):
    content = encoded(PICTURE)
    for number in range(count):
        (tmp_path / f"{number:03d}.png").write_bytes(content[: 100 if number < bad else None])
        (tmp_path / f"{number:03d}.txt").write_text("a fox")
    source = open_source(str(tmp_path))
    if stops:
        with pytest.raises(DataError, match=f"{bad} of {count} examples cannot be used, more than 1 %"):
            opened(source, tmp_path / ".cache")
    else:
        assert len(opened(source, tmp_path / ".cache")) == count - bad


# memory

_SCAN = """
import resource, sys
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
def peak():
    return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] // 1024
before = peak()
for problem in scan(open_source(sys.argv[1])):
    print(problem)
print(before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_bombs_take_no_memory(tmp_path):
    """Measures the peak of a whole separate process, interpreter and imports included."""
    for number, content in enumerate([bomb(), gif_bomb(), jpeg_of(65_000, 65_000), webp_of(16_383, 16_383)] * 2):
        one(tmp_path / "d", "png", content)
        for suffix in ("png", "txt"):
            (tmp_path / "d" / f"x.{suffix}").rename(tmp_path / "d" / f"{number}.{suffix}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCAN, str(tmp_path / "d")],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    *problems, numbers = done.stdout.splitlines()
    assert len(problems) == 8
    before, peak = map(int, numbers.split())
    assert peak < 400, f"{before} MiB after the imports, {peak} MiB at the peak"
