"""Remarks on noteworthy images that are still used, in `check` and whenever a cache is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.data.cache.latents import INDEX
from seppo_fast.data.media import colours
from seppo_fast.data.remarks import Remarks, remark_lines
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import Source, open_source
from tests.helpers.cache import RESOLUTION, opened
from tests.helpers.clips import numbered_frames, write_clip
from tests.helpers.hostile import run_config
from tests.helpers.pictures import encoded, pixels
from tests.helpers.profiles import P3_PROFILE

SMALL = "are enlarged more than twofold: their shorter side is below half of 16 pixels"
CROPPED = "lose more than half of their area to the centre crop"
SIZES = {"a": (7, 7), "b": (8, 8), "c": (8, 16), "d": (8, 17), "e": (40, 17), "f": (1, 1), "g": (3, 300)}
"""Heights and widths of images that become squares of 16 pixels."""


def make(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES) -> Path:
    folder.mkdir()
    for name, (height, width) in sizes.items():
        (folder / f"{name}.png").write_bytes(encoded(pixels(1, height, width)))
        (folder / f"{name}.txt").write_text("a fox")
    return folder


def remarks_of(source: Source, losers: bool = True) -> dict[str, list[str]]:
    remarks = Remarks(RESOLUTION)
    assert scan(source, losers=losers, remarks=remarks) == []
    return remarks.of([example.id for example in source])


def told(lines: list[str]) -> list[str]:
    return [line for line in lines if " of " in line and ("enlarged" in line or "lose" in line)]


def test_small_and_long_pictures_are_counted_and_named(tmp_path, tiny, capsys):
    folder = make(tmp_path / "d")
    small, cropped = ["a.png", "f.png", "g.png"], ["d.png", "e.png", "g.png"]
    assert remarks_of(open_source(str(folder))) == {"small": small, "cropped": cropped}
    lines: list[str] = []
    cache = opened(open_source(str(folder)), tmp_path / "cache", report=lines.append)
    expected = [
        f"3 of 7 images {SMALL}: a.png, f.png, g.png",
        f"3 of 7 images {CROPPED}: d.png, e.png, g.png",
    ]
    assert cache.remarks == {"small": small, "cropped": cropped}
    assert told(lines) == expected
    lines.clear()
    opened(open_source(str(folder)), tmp_path / "cache", report=lines.append)  # repeated although nothing is encoded
    assert lines == expected
    config = run_config(tmp_path, tiny, data={"source": str(folder), "resolution": RESOLUTION})
    assert main(["check", str(config)]) == 0
    assert told(capsys.readouterr().out.splitlines()) == expected


def test_the_turned_picture_counts(tmp_path):
    """The size after rotation counts: a rotated 8 x 17 is still elongated, and its shorter side is still 8."""
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = make(tmp_path / "d", {"a": (8, 17)})
    (folder / "a.png").write_bytes(encoded(pixels(1, 8, 17), exif=exif))
    assert remarks_of(open_source(str(folder))) == {"cropped": ["a.png"]}


def test_losers_count_where_they_are_used(tmp_path):
    good, tiny = encoded(pixels(1, 16, 16)), encoded(pixels(2, 4, 4))
    table = {
        "jpg_0": [good, tiny, good, tiny], "jpg_1": [tiny, good, good, tiny], "label_0": [1, 1, 1, 0],
        "label_1": [0, 0, 0, 1], "caption": ["x"] * 4,
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    source = open_source(str(tmp_path / "p.parquet"))
    both = ["p.parquet:0 (loser)", "p.parquet:1", "p.parquet:3", "p.parquet:3 (loser)"]
    assert remarks_of(source) == {"small": both}
    assert remarks_of(source, losers=False) == {"small": ["p.parquet:1", "p.parquet:3"]}
    for losers, count in ((True, "4 of 8"), (False, "2 of 4")):
        lines: list[str] = []
        opened(source, tmp_path / "cache", losers=losers, report=lines.append)
        (line,) = told(lines)
        assert line.startswith(f"{count} images {SMALL}: ")
        assert line.endswith("and 1 more" if losers else "p.parquet:3")


def test_a_pair_that_is_left_out_is_not_remarked_on(tmp_path):
    good, tiny = encoded(pixels(1, 16, 16)), encoded(pixels(2, 4, 4))
    count = 100
    table = {
        "jpg_0": [good] * (count - 1) + [tiny], "jpg_1": [good] * (count - 1) + [good[:60]], "label_0": [1] * count,
        "label_1": [0] * count, "caption": ["x"] * count,
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    cache = opened(open_source(str(tmp_path / "p.parquet")), tmp_path / "cache")
    assert (len(cache.dropped), cache.remarks) == (1, {})
    assert "remarks" not in json.loads((cache.folder / INDEX).read_text())


def test_clips_are_remarked_on_as_pictures_are(tmp_path):
    for name, (height, width) in {"a": (16, 64), "b": (64, 64), "c": (32, 48)}.items():
        write_clip(tmp_path / f"{name}.mp4", numbered_frames(20, height, width))
        (tmp_path / f"{name}.txt").write_text("a clip")
    remarks = Remarks(64)
    source = open_source(str(tmp_path))
    assert scan(source, frames=4, remarks=remarks) == []
    assert remarks.of([example.id for example in source]) == {"small": ["a.mp4"], "cropped": ["a.mp4"]}


def test_names_are_escaped_and_few():
    names = [f"{n}\x1b\n\udce9.png" for n in range(9)]
    (line,) = remark_lines({"small": names}, 10, 16, None)
    assert line == f"9 of 10 images {SMALL}: " + ", ".join(rf"{n}\x1b\n\udce9.png" for n in range(3)) + " and 6 more"


def test_a_kind_that_is_not_known_is_passed_over(tmp_path):
    """The index may come from a later version, or be damaged."""
    folder = make(tmp_path / "d", {"a": (16, 16)})
    cache = opened(open_source(str(folder)), tmp_path / "cache")
    index = json.loads((cache.folder / INDEX).read_text())
    (cache.folder / INDEX).write_text(json.dumps(index | {"remarks": {"later": ["a.png"], "small": [3]}}))
    lines: list[str] = []
    opened(open_source(str(folder)), tmp_path / "cache", report=lines.append)
    assert lines == ["1 of 1 image is enlarged more than twofold: its shorter side is below half of 16 pixels: 3"]


def test_that_profiles_are_not_read_is_told_once(tmp_path, monkeypatch, tiny, capsys):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(pixels(number), icc_profile=P3_PROFILE))
        (tmp_path / f"{number}.txt").write_text("a fox")
    said = "this Pillow has no littlecms: embedded colour profiles are not converted to sRGB"
    config = run_config(tmp_path, tiny, data={"source": str(tmp_path), "resolution": RESOLUTION})
    for missing in (False, True):
        if missing:
            monkeypatch.setattr(colours.features, "check", lambda _: False)
        colours._conversion.cache_clear()
        assert main(["check", str(config)]) == 0
        assert capsys.readouterr().out.count(said) == missing
        lines: list[str] = []
        opened(open_source(str(tmp_path)), tmp_path / "cache", report=lines.append)
        assert lines.count(said) == missing
        assert remark_lines({}, 3, 16, frames=4) == []  # the line is for images only
    colours._conversion.cache_clear()
