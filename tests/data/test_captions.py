"""Captions in other encodings: the guessed encoding and the command that converts them; what is part of the prompt."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seppo_fast.cli import main
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import FakeEncoder, opened
from tests.helpers.hostile import run_config
from tests.helpers.pictures import encoded, pixels, write_metadata
from tests.helpers.tars import member, write_tar

QUOTED = "it’s a dog – “good”"

# the file's bytes, the encoding named in the message, the caption after conversion
OTHERS: dict[str, tuple[bytes, str, str]] = {
    "Windows quotes": (b"it\x92s a dog", "WINDOWS-1252", "it’s a dog"),
    "Windows": (QUOTED.encode("cp1252"), "WINDOWS-1252", QUOTED),
    "Latin": ("café au lait".encode("latin-1"), "WINDOWS-1252", "café au lait"),
    "UTF-16 little": (b"\xff\xfe" + "a fox\r\n".encode("utf-16-le"), "UTF-16", "a fox"),
    "UTF-16 big": (b"\xfe\xff" + "ä fox".encode("utf-16-be"), "UTF-16", "ä fox"),
    "UTF-16 without a mark": ("a fox".encode("utf-16-le"), "UTF-16LE", "a fox"),
    "UTF-16 without a mark, big": ("a fox".encode("utf-16-be"), "UTF-16BE", "a fox"),
    "UTF-32": ("a fox".encode("utf-32"), "UTF-32", "a fox"),
}
UNCLEAR: dict[str, bytes] = {
    "Cyrillic": "рыжая лиса".encode("cp1251"),
    "Japanese": "赤い狐".encode("shift_jis"),
    "Chinese": "红狐狸".encode("gb18030"),
    "cut": "ein 狐".encode()[:-1],
    "undefined": b"a fox\x81",
}


def captioned(folder: Path, content: bytes, name: str = "x") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(encoded(pixels(1)))
    (folder / f"{name}.txt").write_bytes(content)
    return folder


def converting_line(text: str) -> str:
    return text.split("to convert it: ")[1]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="the line that is told runs iconv")
@pytest.mark.parametrize("name", ["x", "it's a $HOME; of `mine`", "-f", "two\nlines", "ネコ 🙂", "\udce9"])
@pytest.mark.parametrize("case", OTHERS)
def test_the_line_that_is_told_converts_the_caption(tmp_path, case, name):
    content, encoding, caption = OTHERS[case]
    folder = captioned(tmp_path / "a folder", content, name)
    (problem,) = open_source(str(folder)).problems
    assert f"it looks like {encoding}; to convert it: iconv -f {encoding} -t UTF-8 " in str(problem)
    subprocess.run(["bash", "-c", converting_line(str(problem))], check=True)
    source = open_source(str(folder))
    assert [example.prompt for example in source] == [caption]
    assert sorted(path.suffix for path in folder.iterdir()) == [".png", ".txt"]


@pytest.mark.parametrize("case", UNCLEAR)
def test_no_encoding_is_named_where_none_is_likely(tmp_path, case):
    (problem,) = open_source(str(captioned(tmp_path, UNCLEAR[case]))).problems
    assert problem.reason == "x.txt is not UTF-8 text"
    assert problem.hint.startswith("save it as UTF-8")


def test_hints_are_no_part_of_the_key(tmp_path):
    """Hints may be reworded, and they contain a file's path."""
    first, second = (captioned(tmp_path / name, b"it\x92s a dog") for name in ("one", "two"))
    sources = [open_source(str(folder)) for folder in (first, second)]
    assert sources[0].problems[0].hint != sources[1].problems[0].hint
    assert sources[0].digest() == sources[1].digest()


def test_the_encoding_of_a_member_is_named(tmp_path):
    members = [member("x.png", encoded(pixels(1))), member("x.txt", b"it\x92s a dog")]
    (problem,) = open_source(str(write_tar(tmp_path / "s.tar", members))).problems
    assert str(problem) == "s.tar/x.png: x.txt is not UTF-8 text; it looks like WINDOWS-1252"


@pytest.mark.skipif(shutil.which("iconv") is None, reason="the line that is told runs iconv")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "x.png", "text": "it’s a dog"}\n'),
        ("metadata.csv", "file_name,text\nx.png,it’s a dog\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_the_line_that_is_told_converts_a_listing(tmp_path, name, content, encoding):
    (tmp_path / "x.png").write_bytes(encoded(pixels(1)))
    (tmp_path / name).write_bytes(content.encode(encoding))
    with pytest.raises(DataError, match=f"{name}: cannot be read as UTF-8 text.*to convert it: iconv") as caught:
        open_source(str(tmp_path))
    subprocess.run(["bash", "-c", converting_line(str(caught.value))], check=True)
    assert [example.prompt for example in open_source(str(tmp_path))] == ["it’s a dog"]


def test_byte_order_marks_are_no_part_of_a_prompt(tmp_path):
    text = "\ufeff\ufeffa red\r\nfox\ufeff \n"
    captioned(tmp_path / "d", b"\xef\xbb\xbf" + text.encode())
    captioned(tmp_path / "l", b"")
    write_metadata(tmp_path / "l", [{"file_name": "x.png", "text": text}])
    pq.write_table(pa.table({"image": [encoded(pixels(1))], "text": [text]}), tmp_path / "x.parquet")
    write_tar(tmp_path / "s.tar", [member("x.png", encoded(pixels(1))), member("x.txt", text.encode())])
    for spec in ("d", "l", "x.parquet", "s.tar"):
        assert [example.prompt for example in open_source(str(tmp_path / spec))] == ["a red\r\nfox"]


def test_check_tells_the_line_for_every_caption(tmp_path, tiny, capsys):
    """Not only for the first bad caption."""
    for number in range(10):
        captioned(tmp_path / "d", b"it\x92s a dog", f"x{number}")
    config = run_config(tmp_path, tiny, data={"source": str(tmp_path / "d"), "resolution": 16})
    assert main(["check", str(config)]) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad: ")]
    assert len(lines) == 10
    for line in lines:
        subprocess.run(["bash", "-c", converting_line(line)], check=True)
    assert main(["check", str(config)]) == 0


# which caption belongs to which image


def rows_of(cache: LatentCache) -> dict[str, tuple[str, bytes]]:
    """Returns the prompt and embedding of each example."""
    embeds = cache.conditioning(range(len(cache)))["prompt_embeds"]
    return {
        id: (prompt, row.numpy().tobytes()) for id, prompt, row in zip(cache.ids, cache.prompts, embeds, strict=True)
    }


def test_every_picture_keeps_its_own_caption(tmp_path):
    """Compares one cache folder kept over all changes with fresh ones: keys change exactly when the content does."""
    folder = tmp_path / "d"
    texts = [
        "a red fox\nby a lake\nat dawn",
        "a red fox\r\nby a lake\r\nat dawn",
        "same words",
        "same words",
        "a red fox",
    ]
    for number, text in enumerate(texts):
        captioned(folder, text.encode(), f"x{number}")
        (folder / f"x{number}.png").write_bytes(encoded(pixels(number)))

    def swap(first: str, second: str) -> None:
        one, other = folder / f"{first}.txt", folder / f"{second}.txt"
        one.rename(folder / "kept")
        other.rename(one)
        (folder / "kept").rename(other)

    steps = [
        (lambda: None, True),
        (lambda: (folder / "x0.txt").write_text(f"\ufeff  {texts[0]} \n\n"), False),  # the same once stripped
        (lambda: (folder / "x2.txt").touch(), False),
        (lambda: swap("x2", "x3"), False),  # equal texts
        (lambda: swap("x0", "x4"), True),
        (lambda: (folder / "x1.txt").write_text("a red fox\nby a lake"), True),
        (lambda: swap("x0", "x4"), True),
        (lambda: [(folder / f"x3.{kind}").rename(folder / f"y.{kind}") for kind in ("png", "txt")], True),
        (lambda: (folder / "notes.md").write_text("x"), False),
    ]
    keys: list[str] = []
    for number, (change, changes) in enumerate(steps):
        change()
        cache = opened(open_source(str(folder)), tmp_path / "cache")
        fresh = opened(open_source(str(folder)), tmp_path / f"fresh{number}")
        assert rows_of(cache) == rows_of(fresh)
        assert cache.fingerprint == fresh.fingerprint
        for id, (prompt, embedding) in rows_of(cache).items():
            text = (folder / id).with_suffix(".txt").read_bytes().decode("utf-8-sig").strip()
            assert prompt == text
            assert embedding == FakeEncoder().encode_prompts([text])[0]["prompt_embeds"][0].numpy().tobytes()
        assert (cache.fingerprint not in keys) == changes, number
        keys.append(cache.fingerprint)
