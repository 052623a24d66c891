"""Webdataset shards: real tar files, intact and damaged, read in place."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.data.media.images import decode_image, file_ref, load_image
from seppo_fast.data.readers.shards import Member
from seppo_fast.data.scan import decode_all, scan
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import FakeEncoder, direct, opened
from tests.helpers.pictures import encoded, pixels
from tests.helpers.tars import member, pair, refusals, write_tar


def shards(folder: Path, count: int = 3, each: int = 4) -> Path:
    for shard in range(count):
        members = [part for i in range(each) for part in pair(f"{shard}{i:03d}", each * shard + i)]
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_member_that_is_data(tmp_path, form):
    long = "long/" + "x" * 90 + "/" + "y" * (60 if form == tarfile.USTAR_FORMAT else 150)
    members = [
        member("./a.jpg", encoded(pixels(0), "JPEG")), member("./a.json", b'{"caption": " from json ", "url": "x"}'),
        member("b.webp", encoded(pixels(1), "WEBP", lossless=True)), member("b.txt", "\ufeff ä b \n".encode()),
        member("b.json", b'{"text": "not this one"}'), member("b.cls", b"3"), member("b.pyd", b"\x80\x04never loaded"),
        member("sub", type=tarfile.DIRTYPE), member("sub/c.JPEG", encoded(pixels(2), "JPEG")),
        member("._sub/c.txt", b"resource fork"), member("sub/._c.txt", b"resource fork"), member("sub/c.TXT", b"c"),
        member(f"{long}.png", encoded(pixels(3))), member(f"{long}.txt", b"far away"),
    ]  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "one.tar", members, form)))
    assert source.problems == []
    assert not source.has_losers
    assert [(e.id, e.prompt) for e in source] == [
        ("one.tar/a.jpg", "from json"),
        ("one.tar/b.webp", "ä b"),
        ("one.tar/sub/c.JPEG", "c"),
        (f"one.tar/{long}.png", "far away"),
    ]
    expected = [Image.open(io.BytesIO(members[i][1])).convert("RGB") for i in (0, 2, 8, 12)]
    for index in (3, 0, 2, 1):  # random access
        np.testing.assert_array_equal(load_image(source[index].image, 24), np.asarray(expected[index])[:, 4:28])
    assert source.notes == ["2 members are neither image nor caption and not read: .cls (1), .pyd (1)"]
    assert scan(source) == []


def test_a_dot_in_a_name_is_told(tmp_path):
    picture = encoded(pixels(0))
    members = [
        *pair("ok", 1), member("ok.mask.png", picture),  # a further field of example ok
        member("my.photo.png", picture), member("my.photo.txt", b"a photo"),
        member("my.second.jpg", picture), member("my.second.txt", b"another"), member("b.one.png", picture),
    ]  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "one.tar", members)))
    assert [example.id for example in source] == ["one.tar/ok.png"]
    told = refusals(source)
    assert list(told) == ["one.tar/my.photo.png", "one.tar/my.second.jpg", "one.tar/b.one.png"]
    assert all("has a dot in its name" in reason for reason in told.values())


def test_a_folder_a_pattern_and_a_file_are_alike(tmp_path):
    folder = shards(tmp_path / "data")
    source = open_source(str(folder))
    assert len(source) == 12
    assert source[5].id == "001.tar/1001.png"
    digest = source.digest()
    for pattern in ("{000..002}.tar", "00{0..2}.tar", "{000,001,002}.tar", "{00,00}{0..2}.tar"):
        same = open_source(f"{folder}/{pattern}")
        assert [e.id for e in same] == [e.id for e in source]
        assert same.digest() == digest
    assert [e.id for e in open_source(f"{folder}/{{000..001}}.tar")] == [e.id for e in source][:8]
    assert len(open_source(f"{tmp_path}/{{data,data}}/00{{1..2}}.tar")) == 8  # a shard named twice is used once
    assert open_source(str(folder / "002.tar"))[0].id == "002.tar/2000.png"
    (tmp_path / "moved").mkdir()
    for path in folder.iterdir():
        path.rename(tmp_path / "moved" / path.name)
    assert open_source(str(tmp_path / "moved")).digest() == digest


def test_a_pattern_of_what_is_not_there(tmp_path):
    folder = shards(tmp_path, count=2, each=1)
    with pytest.raises(DataError, match=re.escape("2 of 4 shards do not exist; the first is") + ".*002.tar"):
        open_source(f"{folder}/{{000..003}}.tar")
    with pytest.raises(DataError, match=r"3\.\.1 runs backwards"):
        open_source(f"{folder}/{{3..1}}.tar")
    for huge in ("{0..99999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(DataError, match="more than 100000 shards"):
            open_source(f"{folder}/{huge}")
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(f"{folder}/{{000..001}}.tgz")


def bad_members() -> dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str, str]]:
    """Returns by case: members, the id of the problem, part of its reason."""
    png, text = encoded(pixels(1)), b"caption"
    one, txt = member("x.png", png), member("x.txt", text)
    return {
        "parent": ([member("../x.png", png), member("../x.txt", text)], "../x.png", "outside"),
        "absolute": ([member("/etc/x.png", png)], "/etc/x.png", "outside"),
        "symlink": ([member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), txt], "x.png", "a link"),
        "hard link": ([member("x.png", type=tarfile.LNKTYPE, linkname="good.png"), txt], "x.png", "a link"),
        "linked caption": ([one, member("x.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "x.txt", "a link"),
        "device": ([member("x.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), txt], "x.png", "a device"),
        "pipe": ([member("x.png", type=tarfile.FIFOTYPE), txt], "x.png", "a device or a pipe"),
        "twice": ([one, txt, member("x.png", png)], "x.png", "two members of this name"),
        "twice with a dot": ([one, txt, member("./x.txt", b"other")], "x.txt", "two members of this name"),
        "two images": ([one, txt, member("x.jpg", png)], "x.jpg", "several images: x.jpg, x.png"),
        "no caption": ([one], "x.png", "no caption: the shard holds no x.txt and no x.json"),
        "no image": ([txt], "x", "a caption without an image"),
        "empty caption": ([one, member("x.txt", b" \n")], "x.png", "x.txt is empty"),
        "latin caption": ([one, member("x.txt", b"caf\xe9")], "x.png", "not UTF-8"),
        "NUL": ([one, member("x.txt", b"a\0b")], "x.png", "NUL"),
        "long caption": ([one, member("x.txt", b"x" * 1_000_000)], "x.png", "longer than 65536 bytes"),
        "broken json": ([one, member("x.json", b'{"caption": ')], "x.png", "x.json is not JSON"),
        "deep json": ([one, member("x.json", b"[" * 100_000)], "x.png", "x.json is not JSON"),
        "binary json": ([one, member("x.json", b"\x80\x81")], "x.png", "x.json is not JSON"),
        "long json": ([one, member("x.json", b" " * 1_100_000)], "x.png", "longer than 1048576 bytes"),
        "list": ([one, member("x.json", b"[1]")], "x.png", "x.json holds no text under text, caption, prompt, txt"),
        "number": ([one, member("x.json", b'{"caption": 1}')], "x.png", "x.json holds no text"),
        "half": ([one, member("x.json", b'{"caption": "\\ud800"}')], "x.png", "lone surrogate"),
        "cut": ([member("x.png", png[:100]), txt], "x.png", "truncated or damaged"),
        "nothing": ([member("x.png"), txt], "x.png", "zero bytes"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_members())
def test_bad_members_are_named(tmp_path, case):
    members, name, reason = bad_members()[case]
    spec = str(write_tar(tmp_path / "s.tar", [*pair("good", 7), *members, *pair("last", 8)]))
    source = open_source(spec)
    assert [e.prompt for e in source if e.id in ("s.tar/good.png", "s.tar/last.png")] == ["caption 7", "caption 8"]
    found = scan(source)
    assert {problem.id for problem in found} >= {f"s.tar/{name}"}
    assert all(reason in problem.reason for problem in found), found
    assert len(found) <= 2
    assert (
        source.digest()
        != open_source(str(write_tar(tmp_path / "t.tar", [*pair("good", 7), *pair("last", 8)]))).digest()
    )
    with pytest.raises(DataError, match="cannot be used, more than 1 %"):
        opened(source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_odd_names_are_escaped(tmp_path):
    members = [*pair("a", 1), member("x.\udcff\x1b[2J\u202e", b"1"), member("y\udcfe\x1b\n.png", b"no caption")]
    source = open_source(str(write_tar(tmp_path / "s.tar", members)))
    assert source.notes == [
        "1 member is neither image nor caption and not read: .\\udcff\\x1b[2j\\u202e (1)"
    ]  # fmt: skip
    assert [str(problem).partition(": ")[0] for problem in source.problems] == [r"s.tar/y\udcfe\x1b\n.png"]
    said: list[str] = []
    with pytest.raises(DataError) as caught:
        opened(source, tmp_path / "cache", report=said.append)
    for text in (*said, str(caught.value), *source.notes):
        assert text.encode() and text.replace("\n", "").isprintable()


def test_a_digest_holds_no_member_whole(tmp_path):
    large = encoded(pixels(1)) + bytes(np.random.default_rng(0).bytes(40_000_000))
    path = write_tar(tmp_path / "s.tar", [member("a.png", large), member("a.txt", b"caption")])
    source = open_source(str(path))
    tracemalloc.start()
    digest = source.digest()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    wanted = json.dumps(["s.tar/a.png", "caption", hashlib.sha256(large).hexdigest()])
    assert digest == hashlib.sha256(wanted.encode()).hexdigest()
    with open(path, "r+b") as file:
        file.truncate(30_000_000)
    cut = json.dumps(["s.tar/a.png", "caption", "ValueError"])
    assert source.digest() == hashlib.sha256(cut.encode()).hexdigest()


def test_few_large_members_are_open_at_once(tmp_path, monkeypatch):
    source = open_source(str(shards(tmp_path, 1, 9)))
    read: list[Member] = []
    plain = Member.read
    monkeypatch.setattr(Member, "read", lambda member: read.append(member) or plain(member))
    read.clear()
    for most, ahead in ((1, 2), (2**30, 2 * min(8, os.cpu_count() or 1) + 1)):
        monkeypatch.setattr("seppo_fast.data.scan._MOST_BYTES", most)
        read.clear()
        ids = []
        for example, outcome in decode_all(source, lambda _, name, stream: decode_image(name, stream).size):
            ids.append(example.id)
            assert outcome == [(32, 24)]
            assert len(read) <= len(ids) + ahead - 1
        assert ids == [example.id for example in source]
        assert len(read) == 9


def header_of(content: bytes, name: bytes) -> int:
    return content.index(name + b"\0")


def resized(content: bytes, name: bytes, size: bytes) -> bytes:
    """Returns a tar whose member declares another size, with a correct header checksum."""
    start = header_of(content, name)
    header = bytearray(content[start : start + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:start] + bytes(header) + content[start + 512 :]


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (b"77777777777\0", "says that it has 8589934591 bytes"),
        (b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7, "says that it has"),
        (b"\xff" * 10 + b"\xfc\0", "damaged"),
        (b"00004000000\0", "truncated: the shard ends in the middle of it"),
        (b"not a size!\0", "damaged after 4 members"),
    ],
)
def test_sizes_that_are_lies(tmp_path, size, reason):
    content = write_tar(tmp_path / "s.tar", [*pair("a", 1), *pair("b", 2), *pair("c", 3)]).read_bytes()
    (tmp_path / "s.tar").write_bytes(resized(content, b"c.png", size))
    source = open_source(str(tmp_path / "s.tar"))
    assert [e.id for e in source] == ["s.tar/a.png", "s.tar/b.png"]
    assert any(reason in told for told in refusals(source).values()), refusals(source)
    assert source.digest()


def test_a_long_name_that_never_ends(tmp_path):
    """The header declares a name of 4 GiB, and the (sparse) file is that large."""
    content = write_tar(tmp_path / "s.tar", [member("n" * 200, b"x"), *pair("a", 1)], tarfile.GNU_FORMAT).read_bytes()
    (tmp_path / "s.tar").write_bytes(resized(content, b"././@LongLink", b"%011o\0" % 2**32))
    with open(tmp_path / "s.tar", "r+b") as file:
        file.truncate(2**32 + 2**20)
    source = open_source(str(tmp_path / "s.tar"))
    assert len(source) == 0
    assert "a header of" in refusals(source)["s.tar"]


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8, 0.97])
def test_a_truncated_shard_is_named_and_its_beginning_used(tmp_path, keep):
    members = [part for i in range(10) for part in pair(f"{i}", i)]
    content = write_tar(tmp_path / "s.tar", members).read_bytes().rstrip(b"\0")
    (tmp_path / "s.tar").write_bytes(content[: int(keep * len(content))])
    source = open_source(str(tmp_path / "s.tar"))
    assert 1 <= len(source) < 10
    assert any("truncated" in reason for reason in refusals(source).values())
    for index, example in enumerate(source):
        np.testing.assert_array_equal(load_image(example.image, 24), pixels(index)[:, 4:28])


def test_a_shard_without_its_end_mark_is_truncated(tmp_path):
    content = write_tar(tmp_path / "s.tar", [*pair("a", 1), *pair("b", 2)]).read_bytes()
    (tmp_path / "s.tar").write_bytes(content[: header_of(content, b"b.txt")])
    source = open_source(str(tmp_path / "s.tar"))
    assert refusals(source) == {
        "s.tar": "truncated or damaged after 3 members (no end mark)",
        "s.tar/b.png": "no caption: the shard holds no b.txt and no b.json",
    }


def test_archives_put_together_are_read_to_their_end(tmp_path):
    parts = [
        write_tar(tmp_path / "a.tar", [*pair("a", 1), *pair("twice", 2)]).read_bytes(),
        write_tar(tmp_path / "b.tar", [*pair("b", 3), *pair("twice", 4)], tarfile.GNU_FORMAT).read_bytes(),
        write_tar(tmp_path / "c.tar", [*pair("c", 5)]).read_bytes(),
    ]
    digests = set()
    for gap in (b"", bytes(512), bytes((1 << 20) + 512)):
        (tmp_path / "x.tar").write_bytes(gap.join(parts))
        source = open_source(str(tmp_path / "x.tar"))
        assert [(e.id, e.prompt) for e in source] == [
            (f"x.tar/{n}.png", f"caption {i}") for n, i in zip("abc", (1, 3, 5))
        ]
        for example, seed in zip(source, (1, 3, 5)):
            np.testing.assert_array_equal(load_image(example.image, 24), pixels(seed)[:, 4:28])
        assert refusals(source) == {
            "x.tar/twice.png": "the shard holds two members of this name",
            "x.tar/twice.txt": "the shard holds two members of this name",
        }
        digests.add(source.digest())
    assert len(digests) == 1


@pytest.mark.parametrize("padding", [0, 1024, (1 << 21) + 300])
def test_zeros_behind_the_end_mark_are_padding(tmp_path, padding):
    content = write_tar(tmp_path / "s.tar", pair("a", 1)).read_bytes()
    before = open_source(str(tmp_path / "s.tar")).digest()
    (tmp_path / "s.tar").write_bytes(content + bytes(padding))
    source = open_source(str(tmp_path / "s.tar"))
    assert (source.problems, source.digest()) == ([], before)


@pytest.mark.parametrize("rest", [b"\n", b"<html>" * 1000, b"x" * 511, b"\0\0\0x" + bytes(700)])
def test_what_is_no_archive_behind_the_end_mark_is_told(tmp_path, rest):
    content = write_tar(tmp_path / "s.tar", pair("a", 1)).read_bytes()
    (tmp_path / "s.tar").write_bytes(content + rest)
    source = open_source(str(tmp_path / "s.tar"))
    assert [example.id for example in source] == ["s.tar/a.png"]
    left = len(rest.lstrip(b"\0"))
    assert refusals(source) == {"s.tar": f"the last {left} bytes, behind its end mark, are no archive and are not read"}


def test_a_second_archive_that_is_cut_is_told(tmp_path):
    first = write_tar(tmp_path / "s.tar", pair("a", 1)).read_bytes()
    second = write_tar(tmp_path / "s.tar", [*pair("b", 2), *pair("c", 3)]).read_bytes()
    (tmp_path / "s.tar").write_bytes(first + second[: header_of(second, b"c.txt")])
    source = open_source(str(tmp_path / "s.tar"))
    assert [example.id for example in source] == ["s.tar/a.png", "s.tar/b.png"]
    assert refusals(source)["s.tar"] == "truncated or damaged after 5 members (no end mark)"


def test_files_that_are_no_shards(tmp_path):
    whole = shards(tmp_path, count=1, each=400) / "000.tar"
    (tmp_path / "empty.tar").touch()
    (tmp_path / "page.tar").write_text("<html>404</html>" * 100)
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole.read_bytes()))
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path))
    assert len(source) == 400
    found = refusals(source)
    assert found.keys() == {"empty.tar", "page.tar", "packed.tar", "gone.tar"}
    assert found["empty.tar"] == "zero bytes"
    assert "not a tar file" in found["page.tar"]
    assert "compressed: unpack it with gunzip" in found["packed.tar"]
    assert "No such file" in found["gone.tar"]
    assert len(opened(source, tmp_path / "cache")) == 400  # 4 of 404 do not exceed 1 %


def test_random_damage_is_always_a_reason(tmp_path):
    content = write_tar(tmp_path / "s.tar", [*pair("a", 1), *pair("b", 2)], tarfile.GNU_FORMAT).read_bytes()
    rng = np.random.default_rng(0)
    worse = 0
    for place in [*rng.integers(0, len(content), 60), *rng.integers(0, 512, 40)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "d.tar").write_bytes(bytes(damaged))
        source = open_source(str(tmp_path / "d.tar"))
        worse += bool(scan(source))
        source.digest()
    assert worse > 30


def test_the_digest_follows_the_content(tmp_path):
    def digest(members: list[tuple[tarfile.TarInfo, bytes]]) -> str:
        return open_source(str(write_tar(tmp_path / "d" / "s.tar", members))).digest()

    base = digest([*pair("a", 1), *pair("b", 2)])
    assert digest([*pair("a", 1), *pair("b", 2)]) == base
    again = [(info, content) for info, content in [*pair("a", 1), *pair("b", 2)]]
    for info, _ in again:
        info.mtime = 77
    assert digest(again) == base  # packed at another time
    others = {
        digest([*pair("a", 1), *pair("b", 3)]),
        digest([*pair("a", 1), *pair("b", 2, "caption x")]),
        digest([*pair("a", 1), *pair("c", 2)]),
        digest([*pair("b", 2), *pair("a", 1)]),
        digest([*pair("a", 1)]),
        digest([*pair("a", 1), *pair("b", 2), member("c.png", b"x")]),
    }
    assert len(others - {base}) == 6
    # an image overwritten in place with other bytes of the same length
    path = write_tar(tmp_path / "d" / "s.tar", [*pair("a", 1), *pair("b", 2)])
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 1
    path.write_bytes(bytes(content))
    assert open_source(str(path)).digest() not in {base, *others}


def test_the_cache_of_shards_is_that_of_the_folder_they_were_packed_from(tmp_path):
    source = open_source(str(shards(tmp_path / "data")))
    encoder = FakeEncoder()
    cache = opened(source, tmp_path / "cache", encoder)
    assert cache.ids == [e.id for e in source]
    assert cache.prompts == [f"caption {i}" for i in range(12)]
    folder = tmp_path / "loose"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02d}.png").write_bytes(encoded(pixels(i)))
    for i, row in enumerate(cache.winners(range(12))):
        assert (row == direct(source[i].image, encoder)).all()
        loose = load_image(file_ref(folder / f"{i:02d}.png"), 16)
        np.testing.assert_array_equal(load_image(source[i].image, 16), loose)
    assert opened(open_source(str(tmp_path / "data")), tmp_path / "cache").fingerprint == cache.fingerprint


def test_nothing_is_written_but_the_cache(tmp_path, monkeypatch):
    spec = str(shards(tmp_path / "data", 1))
    written: list[object] = []
    plain = builtins.open

    def watched(file: object, mode: str = "r", *rest: object, **options: object) -> object:
        if set(mode) & set("wax+"):
            written.append(file)
        return plain(file, mode, *rest, **options)

    monkeypatch.setattr(builtins, "open", watched)
    for name in ("extract", "extractall", "extractfile"):
        monkeypatch.setattr(tarfile.TarFile, name, lambda *_, **__: pytest.fail("extracted"))
    source = open_source(spec)
    assert scan(source) == []
    source.digest()
    assert written == []
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["000.tar"]


def test_shards_beside_images_are_refused(tmp_path):
    shards(tmp_path, 1)
    (tmp_path / "a.png").write_bytes(encoded(pixels(1)))
    with pytest.raises(DataError, match="holds both tar files and images"):
        open_source(str(tmp_path))


def test_check_and_training_on_shards(tmp_path, tiny, capsys):
    folder = shards(tmp_path / "data", 3, 4)
    config = tmp_path / "run.yaml"
    tree = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(tiny), "train": "lora", "lora_rank": 2, "precision": "fp32"},
        "data": {"source": f"{folder}/{{000..002}}.tar", "resolution": 16, "cache": str(tmp_path / "cache")},
        "train": {"updates": 1, "pairs_per_update": 4, "micro_batch": 4},
        "sampler": {"steps": 1, "batch": 4},
        "log": {"sample_every": 0},
    }
    config.write_text(json.dumps(tree))  # JSON is YAML
    assert main(["check", str(config)]) == 0
    assert "data: 12 examples, 0 bad" in capsys.readouterr().out
    assert main(["train", str(config)]) == 0
    assert (tmp_path / "run" / "weights").is_dir()
    write_tar(folder / "001.tar", [*pair("a", 1), member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")])
    assert main(["check", str(config)]) == 3
    assert "bad: 001.tar/x.png: a link, not a file" in capsys.readouterr().out
