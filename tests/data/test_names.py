"""Different spellings of one file name, linked folders, and files that operating systems keep beside the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from benchmarks.harness.forks import ROOT
from seppo_fast.data.media.images import load_image
from seppo_fast.data.names import walk_files
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import Source, open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.clips import numbered_frames, write_clip
from tests.helpers.pictures import encoded, pickapic, picture, pixels, write_metadata
from tests.helpers.tars import member, refusals, write_tar

NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def contents(source: Source) -> list[tuple[str, str, int]]:
    """Returns the id, prompt and seed of each image."""
    found = []
    for example in source:
        square = load_image(example.image, 24)
        seeds = [seed for seed in range(10) if (square == pixels(seed)[:, 4:28]).all()]
        found.append((example.id, example.prompt, *seeds))
    return found


def relative(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in walk_files(folder)]


# spellings


def test_a_picture_and_its_caption_in_two_spellings(tmp_path):
    picture(tmp_path / f"{NFD}.png", 1)
    (tmp_path / f"{NFC}.txt").write_text("coffee")
    source = open_source(str(tmp_path))
    assert contents(source) == [(f"{NFD}.png", "coffee", 1)]
    assert source.problems == []


def test_the_exact_name_comes_first(tmp_path):
    picture(tmp_path / f"{NFD}.png", 1, "decomposed")
    picture(tmp_path / f"{NFC}.png", 2, "composed")
    assert contents(open_source(str(tmp_path))) == [(f"{NFD}.png", "decomposed", 1), (f"{NFC}.png", "composed", 2)]
    (tmp_path / f"{NFD}.txt").unlink()
    source = open_source(str(tmp_path))
    assert contents(source) == [(f"{NFC}.png", "composed", 2)]  # a caption is used for one image only
    assert [problem.reason for problem in source.problems] == [f"no caption: {NFD}.txt is missing"]


def test_a_listing_spells_names_otherwise(tmp_path):
    picture(tmp_path / "sub" / f"{NFD}.png", 1)
    picture(tmp_path / "sub" / "x.png", 2)
    picture(tmp_path / "back\\slash.png", 3)
    rows = [f"sub/{NFC}.png", "sub\\x.png", "back\\slash.png", ".\\sub\\x.png", "..\\x.png", "sub\\gone.png"]
    write_metadata(tmp_path, [{"file_name": name, "text": str(row)} for row, name in enumerate(rows)])
    source = open_source(str(tmp_path))
    found = [(example.id, example.image.name.removeprefix(f"{tmp_path}/")) for example in source]
    assert found == [
        (f"sub/{NFC}.png", f"sub/{NFD}.png"),
        ("sub\\x.png", "sub/x.png"),
        ("back\\slash.png", "back\\slash.png"),
        (".\\sub\\x.png#4", "sub/x.png"),
        ("..\\x.png", "..\\x.png"),
        ("sub\\gone.png", "sub\\gone.png"),
    ]
    assert source.notes == []  # no file is unlisted
    assert {problem.id: problem.reason for problem in scan(source)} == {
        "..\\x.png": "the file is missing",
        "sub\\gone.png": "the file is missing",
    }
    (tmp_path.parent / "x.png").write_bytes(encoded(pixels(5)))
    assert [problem.id for problem in scan(open_source(str(tmp_path)))] == ["..\\x.png", "sub\\gone.png"]


def test_a_csv_of_clips_spells_names_otherwise(tmp_path):
    for name in (f"sub/{NFD}.mp4", "sub/b.mp4", "back\\slash.mp4"):
        write_clip(tmp_path / name, numbered_frames(5))
    rows = [f"sub/{NFC}", NFC, "sub\\b.mp4", "back\\slash", "..\\b"]
    lines = ["videoid,name", *(f"{name},{row}" for row, name in enumerate(rows))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "list.csv"))
    found = [example.image.name.removeprefix(f"{tmp_path}/") for example in source]
    assert found == [f"sub/{NFD}.mp4", f"sub/{NFD}.mp4", "sub/b.mp4", "back\\slash.mp4"]
    assert [problem.id for problem in source.problems] == ["..\\b"]
    assert source.notes == []


def test_members_of_a_shard_in_two_spellings(tmp_path):
    members = [
        member(f"{NFD}.png", encoded(pixels(1))), member(f"{NFC}.txt", b"coffee"),
        member(f"a/{NFC}.png", encoded(pixels(2))), member(f"a/{NFC}.txt", b"composed"),
        member(f"a/{NFD}.png", encoded(pixels(3))), member(f"a/{NFD}.txt", b"decomposed"),
        member(f"b/{NFC}.png", encoded(pixels(4))), member(f"b/{NFD}.png", encoded(pixels(5))),
        member(f"b/{NFC}.txt", b"whose"),
    ]  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "s.tar", members)))
    assert contents(source) == [
        (f"s.tar/{NFD}.png", "coffee", 1),
        (f"s.tar/a/{NFC}.png", "composed", 2),
        (f"s.tar/a/{NFD}.png", "decomposed", 3),
        (f"s.tar/b/{NFC}.png", "whose", 4),
    ]
    assert list(refusals(source)) == [f"s.tar/b/{NFD}.png"]


# letters of other languages, and bytes that are not letters

ODD = ["ネコ é 🙂", "two\nlines", "n" * 240, os.fsdecode(b"caf\xe9"), " space ", "it's"]
_OPEN = """
import json, sys
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
for spec in sys.argv[1:]:
    source = open_source(spec)
    told = [[problem.id, problem.reason] for problem in scan(source)]
    print(json.dumps([[example.id for example in source], told, source.digest()]))
"""


def test_names_are_the_same_in_every_locale(tmp_path):
    """In an ASCII locale Python decodes the bytes of other letters as lone surrogates."""
    for number, name in enumerate(ODD):
        picture(tmp_path / "loose" / f"{name}.png", number, f"caption {number}")
    picture(tmp_path / "loose" / f"{NFD}.png", 7)
    (tmp_path / "loose" / f"{NFC}.txt").write_text("coffee")
    picture(tmp_path / "loose" / "bare é.png", 8)
    for name in ("ネコ", NFD):
        picture(tmp_path / "listed" / "é" / f"{name}.png", 1)
    names = ["é/ネコ.png", f"é/{NFC}.png", "é\\ネコ.png", "é/gone.png"]
    write_metadata(tmp_path / "listed", [{"file_name": name, "text": "x"} for name in names])
    write_tar(tmp_path / "packed" / "é.tar", [member("ネコ.png", encoded(pixels(1))), member("ネコ.txt", b"x")])
    pickapic(tmp_path / "table" / "ネコ.parquet", [(1.0, 0.0)], ["x"])
    specs = [str(tmp_path / name) for name in ("loose", "listed", "packed", "table")]
    told = []
    for locale in ({"PYTHONUTF8": "1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}):
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | locale
        done = subprocess.run([sys.executable, "-c", _OPEN, *specs], capture_output=True, env=environment, check=True)
        told.append([json.loads(line) for line in done.stdout.decode("ascii").splitlines()])
    assert told[0] == told[1]
    loose, listed, packed, table = told[0]
    assert set(loose[0]) == {f"{name}.png" for name in (*ODD, NFD)}
    assert loose[1] == [["bare é.png", "no caption: bare é.txt is missing"]]
    assert listed[0] == ["é/ネコ.png", f"é/{NFC}.png", "é\\ネコ.png#3", "é/gone.png"]
    assert listed[1] == [["é/gone.png", "the file is missing"]]
    assert (packed[0], table[0]) == (["é.tar/ネコ.png"], ["ネコ.parquet:0"])


# linked folders


def test_linked_folders_are_followed(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    picture(root / "a.png", 1, "here")
    picture(elsewhere / "b.png", 2, "there")
    picture(elsewhere / "deep" / "c.png", 3, "deeper")
    before = open_source(str(root)).digest()
    (root / "more").symlink_to(elsewhere)
    assert contents(open_source(str(root))) == [
        ("a.png", "here", 1),
        ("more/b.png", "there", 2),
        ("more/deep/c.png", "deeper", 3),
    ]
    assert scan(open_source(str(root))) == []
    assert open_source(str(root)).digest() != before
    (tmp_path / "door").symlink_to(root)
    assert open_source(str(tmp_path / "door")).digest() == open_source(str(root)).digest()


def test_each_folder_is_taken_once(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "c.png").touch()
    (elsewhere / "b.png").touch()
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.png").touch()
    (root / "alias").symlink_to("real")  # sorts before its target
    (root / "first").symlink_to(elsewhere / "deep")
    (root / "second").symlink_to(elsewhere)
    (root / "third").symlink_to(elsewhere)
    assert relative(root) == ["first/c.png", "real/a.png", "second/b.png"]


def test_loops_of_links_end(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.png").touch()
    (tmp_path / "beside.png").touch()
    elsewhere.mkdir()
    (elsewhere / "b.png").touch()
    (root / "sub" / "up").symlink_to("..")
    (root / "sub" / "above").symlink_to(tmp_path)
    (root / "all").symlink_to("/")
    (root / "out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "self").symlink_to(elsewhere)
    (root / "round").symlink_to("round")
    (root / "nowhere").symlink_to("gone")
    assert relative(root) == ["nowhere", "out/b.png", "round", "sub/a.png"]


def test_all_kinds_of_data_lie_in_linked_folders(tmp_path):
    kinds = {name: tmp_path / "elsewhere" / name for name in ("pictures", "shards", "tables", "clips")}
    picture(kinds["pictures"] / "x.png", 1)
    write_tar(kinds["shards"] / "x.tar", [member("a.png", encoded(pixels(1))), member("a.txt", b"one")])
    pickapic(kinds["tables"] / "x.parquet", [(1.0, 0.0)], ["one"])
    write_clip(kinds["clips"] / "x.mp4", numbered_frames(5))
    for name, target in kinds.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "more").symlink_to(target)
    write_metadata(tmp_path / "pictures", [{"file_name": "more/x.png", "text": "one"}])
    (tmp_path / "clips" / "list.csv").write_text("videoid,name\nx,one\n")
    ids = {name: [example.id for example in open_source(str(tmp_path / name))] for name in kinds}
    assert ids == {
        "pictures": ["more/x.png"],
        "shards": ["x.tar/a.png"],
        "tables": ["more/x.parquet:0"],
        "clips": ["x"],
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root lists everything")
def test_a_linked_folder_that_cannot_be_listed_is_named(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "more").symlink_to(closed)
    with pytest.raises(DataError, match="more: this folder cannot be listed"):
        walk_files(tmp_path / "root")


# names that hold no data


@pytest.mark.parametrize(
    "name",
    ["@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle", ".hidden", "@EADIR"],
)
def test_folders_that_systems_keep_are_no_data(tmp_path, name):
    picture(tmp_path / "folder" / "a.png", 1, "one")
    members = [member("a.png", encoded(pixels(1))), member("a.txt", b"one")]
    plain = open_source(str(tmp_path / "folder")).digest()
    packed = open_source(str(write_tar(tmp_path / "shards" / "s.tar", members))).digest()
    picture(tmp_path / "folder" / name / "a.png" / "SYNOPHOTO_THUMB_M.jpg", 2)
    picture(tmp_path / "folder" / "sub" / name / "b.png", 2)
    source = open_source(str(tmp_path / "folder"))
    assert contents(source) == [("a.png", "one", 1)]
    assert (source.problems, source.notes, source.digest()) == ([], [], plain)
    more = [*members, member(f"{name}/b.png", encoded(pixels(2))), member(f"./sub/{name}/c.txt", b"c")]
    source = open_source(str(write_tar(tmp_path / "shards" / "s.tar", more)))
    assert contents(source) == [("s.tar/a.png", "one", 1)]
    assert (source.problems, source.notes, source.digest()) == ([], [], packed)


def test_files_that_systems_keep_are_no_data(tmp_path):
    picture(tmp_path / "a.png", 1, "one")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png"):
        (tmp_path / name).write_text("x")
    assert relative(tmp_path) == ["a.png", "a.txt"]
    members = [member("a.png", encoded(pixels(1))), member("a.txt", b"one"), member("sub/Thumbs.db", b"x")]
    source = open_source(str(write_tar(tmp_path.parent / "s.tar", members)))
    assert (len(source), source.notes) == (1, [])
