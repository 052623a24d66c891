"""Images and data sets in every supported format, and every kind of damage with its reason."""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from seppo_fast.data.media.images import ImageError, bytes_ref, file_ref, load_image
from seppo_fast.data.readers import rows
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.pictures import encoded, header_only_png, pickapic, pixels, problems_of, write_metadata


def jpeg_pixels(seed: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded(pixels(seed), "JPEG"))))[:, 4:28]


# images


def load_bytes(content: bytes, resolution: int = 24) -> np.ndarray:
    return load_image(bytes_ref("picture", lambda: content), resolution)


def test_png_of_the_right_size_is_unchanged():
    square = pixels(0, 24, 24)
    result = load_bytes(encoded(square))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, square)


@pytest.mark.parametrize(("height", "width"), [(24, 32), (32, 24), (24, 26)])
def test_middle_is_cut_out(height, width):
    picture = pixels(1, height, width)
    top, left = (height - 24) // 2, (width - 24) // 2
    np.testing.assert_array_equal(load_bytes(encoded(picture)), picture[top : top + 24, left : left + 24])


def test_scaling_follows_the_shorter_side():
    # a horizontal ramp of 120 x 60, scaled to 30: pixel i of the result covers columns 30 + 2i and 31 + 2i
    ramp = np.repeat(np.arange(120, dtype=np.uint8)[None, :, None], 60, axis=0).repeat(3, axis=2)
    result = load_bytes(encoded(ramp), 30).astype(float)
    expected = np.broadcast_to((30.5 + 2 * np.arange(30))[None, :, None], (30, 30, 3))
    np.testing.assert_allclose(result[:, 3:-3], expected[:, 3:-3], atol=0.51)  # the filter reaches 3 pixels


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (48, 96)])
def test_cutting_first_equals_scaling_first(height, width):
    # smooth, to avoid overshoot: Pillow clips between its two passes, whose order depends on the sizes
    wave = np.sin(np.arange(height)[:, None, None] / 5 + np.arange(width)[None, :, None] / 7 + np.arange(3))
    image = Image.fromarray((128 + 90 * wave).astype(np.uint8))
    factor = 24 / min(height, width)
    scaled = np.asarray(image.resize((round(width * factor), round(height * factor)), Image.Resampling.LANCZOS))
    top, left = (scaled.shape[0] - 24) // 2, (scaled.shape[1] - 24) // 2
    expected = scaled[top : top + 24, left : left + 24].astype(int)
    np.testing.assert_allclose(load_bytes(encoded(image)), expected, atol=1)


def test_a_line_of_pixels_becomes_a_square():
    # scaling before cropping would create 64 x 6,400,000 pixels
    line = np.full((1, 100_000, 3), 77, np.uint8)
    np.testing.assert_array_equal(load_bytes(encoded(line), 64), np.full((64, 64, 3), 77))


def test_alpha_lies_over_white():
    rgba = np.zeros((24, 24, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:12, :, 3] = 255
    rgba[18:, :, 3] = 128
    result = load_bytes(encoded(Image.fromarray(rgba)))
    assert tuple(result[0, 0]) == (200, 0, 0)
    assert tuple(result[15, 0]) == (255, 255, 255)
    expected = np.array([200, 0, 0]) * 128 / 255 + 255 * (1 - 128 / 255)
    np.testing.assert_allclose(result[20, 0], expected, atol=1)


def test_palette_gray_and_transparent_palette():
    colours = Image.fromarray(
        np.repeat(np.array([[[250, 0, 0], [0, 0, 250]]], np.uint8), 12, axis=1).repeat(24, axis=0)
    )
    palette = colours.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    np.testing.assert_array_equal(load_bytes(encoded(palette)), np.asarray(palette.convert("RGB")))
    index = palette.getpixel((0, 0))
    seen = load_bytes(encoded(palette, transparency=index))
    assert tuple(seen[0, 0]) == (255, 255, 255)
    assert tuple(seen[0, 23]) == tuple(palette.convert("RGB").getpixel((23, 0)))
    gray = pixels(5, 24, 24)[..., 0]
    np.testing.assert_array_equal(load_bytes(encoded(Image.fromarray(gray))), np.repeat(gray[..., None], 3, axis=2))


def test_sixteen_bit_gray_keeps_its_upper_byte():
    gray = np.random.default_rng(6).integers(0, 65536, (24, 24)).astype(np.uint16)
    result = load_bytes(encoded(Image.fromarray(gray)))
    np.testing.assert_array_equal(result, np.repeat((gray // 256).astype(np.uint8)[..., None], 3, axis=2))


def test_float_pixels_are_refused():
    with pytest.raises(ImageError, match="32-bit pixels"):
        load_bytes(encoded(Image.fromarray(np.ones((24, 24), np.float32)), "TIFF"))


def test_cmyk_jpeg():
    red = Image.new("CMYK", (24, 24), (0, 255, 255, 0))
    result = load_bytes(encoded(red, "JPEG"))
    np.testing.assert_allclose(result.reshape(-1, 3).mean(0), [255, 0, 0], atol=4)


def test_exif_orientation_is_applied():
    picture = pixels(7, 24, 24)
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    content = encoded(picture, "PNG", exif=exif)
    np.testing.assert_array_equal(load_bytes(content), np.rot90(picture, -1))


def test_webp_is_read():
    picture = pixels(8, 24, 24)
    np.testing.assert_array_equal(load_bytes(encoded(picture, "WEBP", lossless=True)), picture)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 10_500, 40_000])
def test_a_bomb_is_refused_before_decoding(side):
    with pytest.raises(ImageError, match="too large"):
        load_bytes(header_only_png(side, side))
    # an image exactly at the limit reaches the decoder, which finds no pixels
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_bytes(header_only_png(8_000, 8_000))


def test_a_real_bomb_takes_no_memory(tmp_path, monkeypatch):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "bomb.png")

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    with pytest.raises(ImageError, match=re.escape("9000 x 9000 is 81 megapixels, the limit is 64")):
        load_image(file_ref(tmp_path / "bomb.png"), 24)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_named(kind):
    content = encoded(pixels(9, 40, 40), kind)
    for length in (1, 8, 30, len(content) // 2, len(content) * 3 // 4):
        with pytest.raises(ImageError, match="^picture: (truncated or damaged|not an image)"):
            load_bytes(content[:length])


def test_a_flipped_byte_never_gives_another_error():
    content = bytearray(encoded(pixels(10), "PNG"))
    rng = np.random.default_rng(0)
    failures = 0
    for position in rng.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        try:
            load_bytes(bytes(damaged))
        except ImageError:
            failures += 1
    assert failures > 100


def test_unreadable_files_say_why(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "folder.png").mkdir()
    for name, reason in {
        "empty.png": "zero bytes",
        "text.png": "not an image",
        "folder.png": "cannot be read",
        "gone.png": "missing",
    }.items():
        with pytest.raises(ImageError, match=reason) as caught:
            load_image(file_ref(tmp_path / name), 24)
        assert caught.value.name == str(tmp_path / name)
        assert caught.value.exit_code == 3


def test_wrong_arguments():
    ref = bytes_ref("picture", lambda: encoded(pixels(0)))
    with pytest.raises(ValueError, match="resolution"):
        load_image(ref, 0)
    with pytest.raises(ValueError, match="crop"):
        load_image(ref, 24, crop="left")


# folders


def test_folder_of_images_and_captions(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.JPG", "b/x.webp", "b/a.jpeg", "a.png"):
        path = tmp_path / name
        path.write_bytes(
            encoded(pixels(len(name)), {"J": "JPEG", "j": "JPEG", "w": "WEBP", "p": "PNG"}[path.suffix[1]])
        )
        path.with_suffix(".txt").write_text(f" {name} caption\n", encoding="utf-8-sig")
    (tmp_path / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "notes.md").write_text("not data")
    source = open_source(str(tmp_path))
    assert [example.id for example in source] == ["a.png", "b/a.jpeg", "b/x.webp", "c.JPG"]
    assert [example.prompt for example in source] == [f"{example.id} caption" for example in source]
    assert not source.has_losers
    assert source[0].loser is None
    assert source[-1].id == "c.JPG"
    with pytest.raises(IndexError):
        source[4]
    np.testing.assert_array_equal(load_image(source[0].image, 24), pixels(5)[:, 4:28])
    assert scan(source) == []


def test_folder_problems_are_named(tmp_path):
    for name in ("good", "uncaptioned", "blank", "latin", "book", "cut"):
        (tmp_path / f"{name}.png").write_bytes(encoded(pixels(len(name))))
        (tmp_path / f"{name}.txt").write_text("a picture")
    (tmp_path / "uncaptioned.txt").unlink()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "book.txt").write_text("x" * 70_000)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "alone.txt").write_text("no picture")
    source = open_source(str(tmp_path))
    assert [example.id for example in source] == ["cut.png", "good.png"]
    found = {problem.id: problem.reason for problem in scan(source)}
    assert found.keys() == {"uncaptioned.png", "blank.png", "latin.png", "book.png", "alone.txt", "cut.png"}
    assert "uncaptioned.txt is missing" in found["uncaptioned.png"]
    assert "blank.txt is empty" in found["blank.png"]
    assert "UTF-8" in found["latin.png"]
    assert "not a caption" in found["book.png"]
    assert "without an image" in found["alone.txt"]
    assert "truncated" in found["cut.png"]


def test_metadata_jsonl(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("z.png", "sub/a.png", "spare.png"):
        (tmp_path / name).write_bytes(encoded(pixels(len(name))))
    write_metadata(
        tmp_path,
        [
            {"file_name": "z.png", "text": " last letter "},
            {"file_name": "sub/a.png", "text": "ä first", "extra": 1},
            "",
            {"file_name": "z.png", "text": "again"},
            {"file_name": "gone.png", "text": "nowhere"},
            {"file_name": "z.png", "text": ""},
            {"text": "no name"},
            {"file_name": "../../etc/secret.png", "text": "escape"},
            {"file_name": "/etc/secret.png", "text": "escape"},
            "{broken",
            "[1]",
        ],
    )
    source = open_source(str(tmp_path))
    assert [(e.id, e.prompt) for e in source] == [
        ("z.png", "last letter"),
        ("sub/a.png", "ä first"),
        ("z.png#4", "again"),
        ("gone.png", "nowhere"),
    ]
    assert source.notes == [f"1 image in {tmp_path} is not listed in metadata.jsonl and not used"]
    found = problems_of(source)
    assert list(found) == [f"metadata.jsonl:{line}" for line in (6, 7, 8, 9, 10, 11)]
    assert "text" in found["metadata.jsonl:6"]
    assert "file_name" in found["metadata.jsonl:7"]
    assert "outside" in found["metadata.jsonl:8"]
    assert "outside" in found["metadata.jsonl:9"]
    assert [p.id for p in scan(source)[-1:]] == ["gone.png"]
    assert [e.id for e in open_source(str(tmp_path / "metadata.jsonl"))] == [e.id for e in source]


def test_folder_digest_follows_content_not_place(tmp_path):
    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(3):
            (folder / f"{i}.png").write_bytes(encoded(pixels(i)))
            (folder / f"{i}.txt").write_text(f"caption {i}")
        return folder

    first, second = make("one"), make("two")
    digest = open_source(str(first)).digest()
    assert open_source(str(second)).digest() == digest
    (second / "1.txt").write_text("caption 1\n")  # the same data once stripped
    assert open_source(str(second)).digest() == digest
    digests = {digest}
    (second / "1.txt").write_text("another")
    digests.add(open_source(str(second)).digest())
    (second / "2.png").write_bytes(encoded(pixels(9)))
    digests.add(open_source(str(second)).digest())
    (second / "0.png").rename(second / "3.png")
    (second / "0.txt").rename(second / "3.txt")
    digests.add(open_source(str(second)).digest())
    (second / "3.txt").unlink()
    digests.add(open_source(str(second)).digest())
    assert len(digests) == 5


# tables

LABELS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.3, 0.7), (None, None), (0.0, 1.0)]
CAPTIONS = ["one", " two ", "tie", "", None, "tie too", "odd", "null", "nine"]


def test_pickapic_parquet(tmp_path):
    pickapic(tmp_path / "p.parquet", LABELS, CAPTIONS)
    source = open_source(str(tmp_path / "p.parquet"))
    assert source.has_losers
    assert [(e.id, e.prompt) for e in source] == [
        ("p.parquet:0", "one"),
        ("p.parquet:1", "two"),
        ("p.parquet:8", "nine"),
    ]
    assert source.ties == 2
    assert source.notes == ["2 of 9 pairs are ties and are not used"]
    found = problems_of(source)
    assert list(found) == [f"p.parquet:{row}" for row in (3, 4, 6, 7)]
    assert found["p.parquet:3"] == found["p.parquet:4"] == "the caption is empty"
    assert "winner" in found["p.parquet:6"]
    for example, winner, loser in zip(source, (0, 3, 17), (1, 2, 16), strict=True):
        np.testing.assert_array_equal(load_image(example.image, 24), jpeg_pixels(winner))
        np.testing.assert_array_equal(load_image(example.loser, 24), jpeg_pixels(loser))


def test_parquet_folder_reads_any_row_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(rows.ParquetRows, "STRETCH", 2)
    pickapic(tmp_path / "d/a.parquet", [(1.0, 0.0)] * 7, ["a"] * 7, row_group_size=5)
    pickapic(tmp_path / "d/b/c.parquet", [(0.0, 1.0)] * 4, ["c"] * 4, row_group_size=3)
    source = open_source(str(tmp_path / "d"))
    names = [f"a.parquet:{i}" for i in range(7)] + [f"b/c.parquet:{i}" for i in range(4)]
    assert [e.id for e in source] == names
    expected = [jpeg_pixels(2 * i) for i in range(7)] + [jpeg_pixels(2 * i + 1) for i in range(4)]
    order = [*range(11), *reversed(range(11)), *np.random.default_rng(0).integers(0, 11, 40)]
    for index in order:
        np.testing.assert_array_equal(load_image(source[int(index)].image, 24), expected[index])


def test_parquet_is_read_in_stretches(tmp_path, monkeypatch):
    pickapic(tmp_path / "p.parquet", [(1.0, 0.0)] * 100, ["x"] * 100)
    source = open_source(str(tmp_path / "p.parquet"))
    read: list[int] = []
    original = rows.ParquetRows._read_stretch
    monkeypatch.setattr(
        rows.ParquetRows, "_read_stretch", lambda self, group: (read.append(group), original(self, group))[1]
    )
    for example in source:
        example.image.open()
        example.loser.open()
    assert len(read) == 4  # stretches of 32 rows, each read once for winner and loser together


def test_parquet_splits_by_file_name(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pickapic(tmp_path / "data" / f"{name}.parquet", [(1.0, 0.0)], [name])
    assert [e.prompt for e in open_source(str(tmp_path))] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert [e.prompt for e in open_source(str(tmp_path), split="test")] == ["test-00000-of-00001"]
    with pytest.raises(DataError, match="no parquet files of split 'validation'; set data.split to one of test, train"):
        open_source(str(tmp_path), split="validation")


def test_parquet_of_images_and_text(tmp_path):
    cells = [{"bytes": encoded(pixels(i)), "path": f"{i}.png"} for i in range(2)] + [{"bytes": None, "path": __file__}]
    pq.write_table(pa.table({"image": cells, "text": ["a", "b", "c"], "id": [7, 8, 9]}), tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    assert not source.has_losers
    assert [e.prompt for e in source] == ["a", "b", "c"]
    np.testing.assert_array_equal(load_image(source[1].image, 24), pixels(1)[:, 4:28])
    assert [(p.id, p.reason) for p in scan(source)] == [("x.parquet:2", "the cell holds no image")]


def test_damaged_and_odd_parquet(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="broken.parquet: not a readable parquet file"):
        open_source(str(tmp_path / "broken.parquet"))
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"]}), tmp_path / "urls.parquet")
    with pytest.raises(DataError, match="columns found: url, caption. Required are jpg_0"):
        open_source(str(tmp_path / "urls.parquet"))
    pq.write_table(pa.table({"image": [b"x"], "caption": [3]}), tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match="caption must hold text"):
        open_source(str(tmp_path / "numbers.parquet"))
    pickapic(tmp_path / "two/a.parquet", [(1.0, 0.0)], ["a"])
    pq.write_table(pa.table({"image": [b"x"], "text": ["a"]}), tmp_path / "two/b.parquet")
    with pytest.raises(DataError, match="b.parquet: its columns differ"):
        open_source(str(tmp_path / "two"))


def test_damage_inside_a_row_group_is_a_bad_example_each(tmp_path):
    path = tmp_path / "p.parquet"
    pickapic(path, [(1.0, 0.0)] * 20, ["x"] * 20, row_group_size=10)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    assert column.path_in_schema == "jpg_0"
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found = scan(open_source(str(path)))
    assert [problem.id for problem in found] == [f"p.parquet:{row}" for row in range(10, 20)]


def test_parquet_digest(tmp_path):
    def digest(folder: str, labels: tuple[float, float] = (1.0, 0.0), caption: str = "a", count: int = 3) -> str:
        pickapic(tmp_path / folder / "p.parquet", [labels] * count, [caption] * count)
        return open_source(str(tmp_path / folder)).digest()

    assert digest("one") == digest("two")
    assert len({digest("three"), digest("four", (0.0, 1.0)), digest("five", caption="b"), digest("six", count=4)}) == 4


# hub


def hub_cache(tmp_path: Path):
    """Returns what `load_dataset` returns for a hub data set: memory-mapped Arrow files."""
    datasets = pytest.importorskip("datasets")
    pickapic(tmp_path / "hub.parquet", LABELS, CAPTIONS)
    return datasets.Dataset.from_parquet(str(tmp_path / "hub.parquet"), cache_dir=str(tmp_path / "cache"))


def test_hub_data_set(tmp_path, monkeypatch):
    data = hub_cache(tmp_path)
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: (asked.append((names, options)), data)[1])
    source = open_source("owner/pairs", split="validation")
    assert asked == [(("owner/pairs",), {"split": "validation"})]
    assert [(e.id, e.prompt) for e in source] == [
        ("owner/pairs:0", "one"),
        ("owner/pairs:1", "two"),
        ("owner/pairs:8", "nine"),
    ]
    assert source.ties == 2
    np.testing.assert_array_equal(load_image(source[2].image, 24), jpeg_pixels(17))
    np.testing.assert_array_equal(load_image(source[2].loser, 24), jpeg_pixels(16))
    assert open_source("owner/pairs").digest() == source.digest()
    assert open_source("owner/other").digest() != source.digest()


def test_hub_image_feature_is_not_decoded(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    cells = [{"bytes": encoded(pixels(i)), "path": None} for i in range(2)]
    data = datasets.Dataset.from_dict({"image": cells, "text": ["a", "b"]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    source = open_source("owner/single")
    assert isinstance(source[1].image.open(), io.BytesIO)
    np.testing.assert_array_equal(load_image(source[1].image, 24), pixels(1)[:, 4:28])


def test_hub_errors_say_what_to_do(monkeypatch):
    datasets = pytest.importorskip("datasets")
    wrapped = datasets.exceptions.DatasetGenerationError("while generating")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    for error, message in [
        (datasets.exceptions.DatasetNotFoundError("gated or gone"), "no such data set on the hub.*login"),
        (ConnectionError("offline"), "cannot be reached.*unset HF_HUB_OFFLINE"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot write its cache.*Permission denied.*Set HF_HOME"),
        (wrapped, "cannot write its cache.*No space left.*Set HF_HOME"),
        (ValueError("Unknown split 'train'"), "owner/name, split 'train'.*Unknown split"),
    ]:

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("datasets.load_dataset", fail)
        with pytest.raises(DataError, match=f"(?s){message}"):
            open_source("owner/name")


# the embedded world, and specs that name no data set


def test_shapes_world():
    from seppo_fast.shapes.world import SIZE, caption, render, scene

    source = open_source("shapes:5:3")
    assert len(source) == 5
    assert [e.id for e in source] == [f"shapes-3-{i}" for i in range(5)]
    assert source[4].prompt == caption(scene(3, 4))
    np.testing.assert_array_equal(load_image(source[4].image, SIZE), render(scene(3, 4)))
    assert open_source("shapes:5")[0].id == "shapes-0-0"
    specs = ("shapes:5:3", "shapes:6:3", "shapes:5:4")
    assert len({open_source(spec).digest() for spec in specs}) == 3
    assert open_source("shapes:5:3").digest() == source.digest()
    assert scan(source) == []


@pytest.mark.parametrize("spec", ["shapes:", "shapes:0", "shapes:-3", "shapes:many", "shapes:4:x"])
def test_wrong_shapes(spec):
    with pytest.raises(DataError, match="shapes:2048"):
        open_source(spec)


def test_nothing_that_fits_names_the_choices(tmp_path):
    (tmp_path / "readme.md").write_text("no data")
    (tmp_path / "both").mkdir()
    (tmp_path / "both/a.png").write_bytes(encoded(pixels(0)))
    pickapic(tmp_path / "both/b.parquet", [(1.0, 0.0)], ["a"])
    (tmp_path / "empty").mkdir()
    for spec, cause in (
        (str(tmp_path / "empty"), f"{tmp_path / 'empty'}: no images, clips, parquet or tar files in this folder."),
        (str(tmp_path / "readme.md"), f"{tmp_path / 'readme.md'}: this kind of file cannot be read as data; "),
        ("", "The name of the data set is empty; "),
    ):
        with pytest.raises(DataError, match=r"(?s)A data set is one of:.*metadata.jsonl.*hub id.*shapes:N") as error:
            open_source(spec)
        assert str(error.value).splitlines()[-1].startswith(cause)  # last, where it is read
    with pytest.raises(DataError, match="both parquet files and images"):
        open_source(str(tmp_path / "both"))


def test_a_misspelt_path_has_a_suggestion_and_no_list(tmp_path, monkeypatch):
    (tmp_path / "my" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for spec in (f"{tmp_path}/my/pictres", "my/pictres"):  # the second could be a hub id
        with pytest.raises(DataError) as error:
            open_source(spec)
        said = str(error.value)
        assert said.startswith(f"{spec}: no such ") and said.endswith(f" Did you mean '{spec[:-3]}ures'?")
        assert "\n" not in said
    for spec in ("word", f"{tmp_path}/none/pictures"):
        with pytest.raises(DataError, match=r"no such file or folder.* such as shapes:2048\.$"):
            open_source(spec)
