"""metadata.jsonl and metadata.csv, for images and clips, and the notes on captions stored elsewhere."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from seppo_fast.data.examples import Example
from seppo_fast.data.media.images import load_image
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.clips import numbered_frames, write_clip
from tests.helpers.pictures import encoded, picture, pixels, problems_of, write_metadata
from tests.helpers.tars import member, write_tar


def write_csv(path: Path, rows: list[list[str]], encoding: str = "utf-8") -> None:
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def prompts(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.id, example.prompt) for example in examples]


def test_a_csv_is_read_as_json_lines_are(tmp_path):
    for name in ("a.png", "sub/b.png", "spare.png"):
        picture(tmp_path / name, len(name))
    rows = [["a.png", "one, two"], ["sub/b.png", ' "said" '], ["a.png", "again"], ["gone.png", "two\r\nlines"]]
    write_csv(tmp_path / "metadata.csv", [["file_name", " text "], *rows], "utf-8-sig")
    source = open_source(str(tmp_path))
    expected = [("a.png", "one, two"), ("sub/b.png", '"said"'), ("a.png#4", "again"), ("gone.png", "two\r\nlines")]
    assert prompts(source) == expected
    assert source.notes == [f"1 image in {tmp_path} is not listed in metadata.csv and not used"]
    assert (load_image(source[1].image, 24) == pixels(9)[:, 4:28]).all()
    assert [problem.id for problem in scan(source)] == ["gone.png"]
    assert prompts(open_source(str(tmp_path / "metadata.csv"))) == expected
    digest = source.digest()
    # if there are two listings, metadata.jsonl is read
    write_metadata(tmp_path, ["", *({"file_name": name, "text": text} for name, text in rows)])
    same = open_source(str(tmp_path))
    assert same.notes == [f"1 image in {tmp_path} is not listed in metadata.jsonl and not used"]
    assert (prompts(same), same.digest()) == (expected, digest)


def test_problems_of_a_csv_are_named(tmp_path):
    picture(tmp_path / "a.png", 1)
    rows = [["file_name", "text"], ["a.png", "fine"], ["a.png", ""], ["", "no name"], ["../b.png", "out"], ["a.png"]]
    write_csv(tmp_path / "metadata.csv", rows)
    source = open_source(str(tmp_path))
    assert prompts(source) == [("a.png", "fine")]
    assert problems_of(source) == {
        "metadata.csv:3": 'a.png: "text" is empty',
        "metadata.csv:4": '"file_name" is missing',
        "metadata.csv:5": "'../b.png' points outside the folder",
        "metadata.csv:6": "1 fields in 2 columns: a caption with a comma needs quotes",
    }
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"open')
    with pytest.raises(DataError, match="metadata.csv: the row that begins in line 2 has an unclosed quote"):
        open_source(str(tmp_path))


def test_a_csv_of_something_else_is_no_listing(tmp_path):
    picture(tmp_path / "a.png", 1, "beside it")
    write_csv(tmp_path / "metadata.csv", [["id", "aesthetic"], ["1", "0.5"]])
    source = open_source(str(tmp_path))
    assert prompts(source) == [("a.png", "beside it")]
    assert source.notes == []


@pytest.mark.parametrize(
    ("record", "caption"),
    [
        ({"text": "a", "caption": "b"}, "a"),
        ({"caption": "b"}, "b"),
        ({"prompt": "c"}, "c"),
        ({"txt": "d"}, "d"),
        ({"text": None, "caption": "x"}, "x"),
        ({"text": " \n", "prompt": "x"}, "x"),
        ({"text": 3, "caption": "x"}, "x"),
        ({"text": ["a"], "txt": "x"}, "x"),
        ({"text": "\ufeffx"}, "x"),
    ],
)
def test_the_first_name_that_holds_text_is_taken(tmp_path, record, caption):
    picture(tmp_path / "d" / "a.png", 1)
    write_metadata(tmp_path / "d", [{"file_name": "a.png"} | record])
    members = [member("a.png", encoded(pixels(1))), member("a.json", json.dumps(record).encode())]
    write_tar(tmp_path / "s.tar", members)
    for spec in ("d", "s.tar"):
        source = open_source(str(tmp_path / spec))
        assert (source.problems, [example.prompt for example in source]) == ([], [caption])


def test_names_that_hold_no_text(tmp_path):
    picture(tmp_path / "a.png", 1)
    records = [
        {},
        {"text": None},
        {"text": 3},
        {"text": None, "caption": 3},
        {"text": "", "caption": " "},
        {"prompt": ""},
    ]
    write_metadata(tmp_path, [{"file_name": "a.png"} | record for record in records])
    assert list(problems_of(open_source(str(tmp_path))).values()) == [
        'a.png: "text" is missing',
        'a.png: "text" is missing',
        'a.png: "text" is no text',
        'a.png: "caption" is no text',
        'a.png: "text" is empty',
        'a.png: "prompt" is empty',
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_listing_of_clips(tmp_path, kind):
    for name in ("a.mp4", "sub/b.mkv", "spare.mov"):
        write_clip(tmp_path / name, numbered_frames(6))
    rows = [("a.mp4", "one"), ("sub/b.mkv", "two"), ("a.png", "a picture")]
    if kind == "csv":
        write_csv(tmp_path / "metadata.csv", [["file_name", "caption"], *map(list, rows)])
    else:
        write_metadata(tmp_path, [{"file_name": name, "caption": text} for name, text in rows])
    source = open_source(str(tmp_path))
    assert source.clips
    assert [(e.id, e.prompt, e.time_lapse) for e in source][:2] == [
        ("a.mp4", "one", False),
        ("sub/b.mkv", "two", False),
    ]
    assert source.notes == [f"1 clip in {tmp_path} is not listed in metadata.{kind} and not used"]
    assert [(p.id, p.reason) for p in scan(source, frames=2)] == [("a.png", "the file is missing")]


def test_a_clip_among_listed_pictures_is_a_bad_example(tmp_path):
    write_clip(tmp_path / "a.mp4", numbered_frames(6))
    picture(tmp_path / "b.png", 1)
    write_metadata(tmp_path, [{"file_name": name, "text": "x"} for name in ("a.mp4", "b.png")])
    source = open_source(str(tmp_path))
    assert not source.clips
    assert [(p.id, p.reason.partition(" (")[0]) for p in scan(source)] == [("a.mp4", "not an image")]


# notes on captions stored elsewhere


def test_a_listing_below_is_pointed_at(tmp_path):
    for name in ("train/a.png", "train/b.png"):
        picture(tmp_path / name, 1)
    write_metadata(tmp_path / "train", [{"file_name": "a.png", "text": "x"}])
    write_csv(tmp_path / "captions.csv", [["file_name", "text"]])
    source = open_source(str(tmp_path))
    assert len(source) == 0
    assert source.notes == [
        "captions.csv is not read: a listing of files must be named metadata.jsonl or metadata.csv and have file_name "
        "and text in each row",
        "train/metadata.jsonl is not read: it lists files below its own folder. To use it, set data.source to "
        f"{tmp_path / 'train'}",
    ]
    assert len(open_source(re.search(r"data\.source to (.*)", source.notes[1])[1])) == 1


def test_captions_under_other_suffixes_are_pointed_at(tmp_path):
    for name, other in {
        "a": "a.caption",
        "b": "b.png.caption",
        "c": "c.json",
        "d": "d.json",
        "e": "other.json",
    }.items():
        picture(tmp_path / f"{name}.png", 1)
        (tmp_path / other).write_text("a caption")
    picture(tmp_path / "good.png", 1, "captioned")
    (tmp_path / "good.json").write_text("{}")
    source = open_source(str(tmp_path))
    assert [problem.reason for problem in source.problems] == [f"no caption: {n}.txt is missing" for n in "abcde"]
    said = "captions are read from .txt files only: rename or convert those that hold one"
    assert source.notes == [
        f"2 files without a caption have a .caption file beside them, the first is a.caption; {said}",
        f"2 files without a caption have a .json file beside them, the first is c.json; {said}",
    ]


def test_kinds_that_are_not_read_are_counted(tmp_path):
    picture(tmp_path / "a.png", 1, "captioned")
    for name in ("b.avif", "c.AVIF", "d.heic", "e.gif", "notes.md"):
        (tmp_path / name).write_bytes(b"x")
    digest = open_source(str(tmp_path)).digest()
    source = open_source(str(tmp_path))
    assert source.notes == [
        "4 images have unsupported formats and are not used: .avif (2), .heic (1), .gif (1); the first is b.avif. To "
        "use such files, convert them to png, jpg or webp"
    ]
    for name in ("b.avif", "c.AVIF", "d.heic", "e.gif"):
        (tmp_path / name).unlink()
    source = open_source(str(tmp_path))
    assert (source.notes, source.digest()) == ([], digest)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "x.wmv").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"no images.* 1 clip has an unsupported format and is not used: \.wmv \(1\); the first is x"
    ):
        open_source(str(tmp_path / "clips"))


def test_a_folder_of_arrow_files_says_the_line_that_converts_it(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for i in range(2):
        picture(tmp_path / "loose" / f"{i}.png", i)
    rows = {"image": [str(tmp_path / "loose" / f"{i}.png") for i in range(2)], "text": ["a", "b"]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(str(tmp_path / "it's one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "splits"))
    monkeypatch.chdir(tmp_path)
    for name in ("it's one", "splits"):
        with pytest.raises(DataError, match="Arrow files, as the datasets library saves them, are not read") as caught:
            open_source(name)
        python, flag, code = shlex.split(str(caught.value).split("parquet file: ")[1])
        assert (python, flag) == ("python", "-c")
        exec(code)
        source = open_source(f"{name}.parquet")
        assert [example.prompt for example in source] == ["a", "b"]
        assert (load_image(source[1].image, 24) == pixels(1)[:, 4:28]).all()
