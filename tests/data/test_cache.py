"""The cache holds exactly the encoder's outputs, is keyed by all that changes them, and is written atomically."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from seppo_fast.data.cache import build
from seppo_fast.data.cache.latents import INDEX
from seppo_fast.data.cache.opening import cache_key
from seppo_fast.data.sources import Source, open_source
from seppo_fast.utils.errors import DataError, NonFiniteError
from tests.helpers.cache import FakeEncoder, direct, make_folder, opened, picture


def make_pairs(path: Path, count: int) -> Source:
    """Writes a table in which every seventh row is a tie; in other even rows the winner is image 0."""
    labels = [0.5 if i % 7 == 0 else float(i % 2 == 0) for i in range(count)]
    columns = {
        "jpg_0": [picture(2 * i) for i in range(count)],
        "jpg_1": [picture(2 * i + 1) for i in range(count)],
        "label_0": labels,
        "label_1": [1 - label for label in labels],
        "caption": [f"prompt {i % 4}" for i in range(count)],
    }
    pq.write_table(pa.table(columns), path)
    return open_source(str(path))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(build, "SHARD_SIZE", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_access_equals_encoding_directly(tmp_path, small_shards, dtype):
    source = make_pairs(tmp_path / "p.parquet", 23)
    encoder = FakeEncoder(dtype)
    cache = opened(source, tmp_path / "cache", encoder)
    assert len(cache) == cache.num_examples == len(source) == 19
    assert cache.has_losers
    assert cache.latent_shape == (4, 4, 4)
    assert cache.ids == [e.id for e in source]
    assert cache.prompts == [e.prompt for e in source]
    assert len(list(cache.folder.glob("latents-*.safetensors"))) == 5
    for indices in ([0], [18, 3, 4, 3, 0, 17], list(range(19)), torch.tensor([7, 2]), []):
        examples = [source[int(i)] for i in indices]
        for got, refs in (
            (cache.winners(indices), [e.image for e in examples]),
            (cache.losers(indices), [e.loser for e in examples]),
        ):
            assert got.shape == (len(refs), 4, 4, 4)
            assert got.dtype == dtype
            for row, ref in zip(got, refs, strict=True):
                assert torch.equal(row, direct(ref, encoder))
        rows = cache.conditioning(indices)["prompt_embeds"]
        assert rows.shape == (len(examples), 5, 3)
        for row, example in zip(rows, examples, strict=True):
            assert torch.equal(row, encoder.encode_prompts([example.prompt])[0]["prompt_embeds"][0])
    assert torch.equal(cache.conditioning([None])["prompt_embeds"], encoder.encode_prompts([""])[0]["prompt_embeds"])


def test_rows_are_copies(tmp_path):
    cache = opened(open_source(str(make_folder(tmp_path / "data", 3))), tmp_path / "cache")
    before = cache.winners([1]).clone()
    cache.winners([1]).zero_()
    assert torch.equal(cache.winners([1]), before)


def test_each_prompt_is_encoded_once(tmp_path):
    encoder = FakeEncoder()
    opened(open_source(str(make_folder(tmp_path / "data", 13))), tmp_path / "cache", encoder)
    assert sorted(encoder.prompts) == ["", *(f"prompt {i}" for i in range(5))]
    assert encoder.images == 13


def test_second_open_encodes_nothing(tmp_path):
    folder = make_folder(tmp_path / "data", 7)
    first = opened(open_source(str(folder)), tmp_path / "cache")
    folder.rename(tmp_path / "moved")
    encoder = FakeEncoder()
    lines: list[str] = []
    second = opened(
        open_source(str(tmp_path / "moved")), tmp_path / "cache", encoder, report=lines.append, batch_size=2
    )
    assert (encoder.images, encoder.prompts, lines) == (0, [], [])
    assert second.fingerprint == first.fingerprint
    assert torch.equal(second.winners(range(7)), first.winners(range(7)))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_winners_only(tmp_path):
    cache = opened(open_source("shapes:3:1"), tmp_path / "cache")
    assert not cache.has_losers
    with pytest.raises(DataError, match="winners only"):
        cache.losers([0])
    pairs = make_pairs(tmp_path / "p.parquet", 4)
    encoder = FakeEncoder()
    without = opened(pairs, tmp_path / "cache", encoder, losers=False)
    assert not without.has_losers
    assert encoder.images == len(pairs) == 3
    both = opened(pairs, tmp_path / "cache")
    assert both.fingerprint != without.fingerprint
    assert torch.equal(both.winners(range(3)), without.winners(range(3)))


def test_index_out_of_range(tmp_path):
    cache = opened(open_source("shapes:3:1"), tmp_path / "cache")
    for index in (3, -1):
        with pytest.raises(IndexError, match=f"index {index} is out of range for a cache of 3"):
            cache.winners([0, index])
        with pytest.raises(IndexError):
            cache.conditioning([index])


def test_key_changes_with_each_thing_it_depends_on(monkeypatch):
    base = {
        "source_digest": "s",
        "fingerprint": {"vae": "1", "dtype": "f"},
        "resolution": 8,
        "crop": "center",
        "losers": True,
    }
    changes = [
        {"source_digest": "t"},
        {"fingerprint": {"vae": "2", "dtype": "f"}},
        {"fingerprint": {"vae": "1", "dtype": "g"}},
        {"resolution": 16},
        {"crop": "other"},
        {"losers": False},
        {},
    ]
    keys = {cache_key(**(base | change)) for change in changes}
    assert len(keys) == len(changes)
    assert cache_key(**(base | {"fingerprint": {"dtype": "f", "vae": "1"}})) == cache_key(**base)
    monkeypatch.setattr("seppo_fast.data.cache.opening.FORMAT_VERSION", 999)
    assert cache_key(**base) in keys  # the content does not depend on the format
    assert cache_key(**base, format_version=2) not in keys


def test_cache_is_made_again_for_another_encoder_or_data(tmp_path):
    folder = make_folder(tmp_path / "data", 4)
    fingerprints = [opened(open_source(str(folder)), tmp_path / "c", FakeEncoder()).fingerprint]
    fingerprints.append(opened(open_source(str(folder)), tmp_path / "c", FakeEncoder(torch.float16)).fingerprint)
    fingerprints.append(opened(open_source(str(folder)), tmp_path / "c", FakeEncoder(name="other")).fingerprint)
    (folder / "0002.txt").write_text("new words")
    changed = opened(open_source(str(folder)), tmp_path / "c", FakeEncoder())
    assert changed.prompts[2] == "new words"
    assert len({*fingerprints, changed.fingerprint}) == 4
    assert len(list((tmp_path / "c").iterdir())) == 4


# bad data


def spoil(folder: Path, *numbers: int) -> None:
    for number in numbers:
        path = folder / f"{number:04d}.png"
        path.write_bytes(path.read_bytes()[:60])


def test_up_to_one_percent_is_left_out_and_listed(tmp_path):
    folder = make_folder(tmp_path / "data", 200)
    spoil(folder, 150)
    (folder / "0003.txt").write_text("")
    lines: list[str] = []
    source = open_source(str(folder))
    cache = opened(source, tmp_path / "cache", report=lines.append)
    assert len(cache) == 198
    assert [problem.id for problem in cache.dropped] == ["0003.png", "0150.png"]
    assert "empty" in cache.dropped[0].reason
    assert "truncated" in cache.dropped[1].reason
    assert [line.split(":")[1].strip() for line in lines if line.startswith("left out")] == ["0003.png", "0150.png"]
    assert cache.ids == [f"{i:04d}.png" for i in range(200) if i not in (3, 150)]
    rows = [2, 3, 148, 149, 197]
    encoder = FakeEncoder()
    for row, got, embed in zip(rows, cache.winners(rows), cache.conditioning(rows)["prompt_embeds"], strict=True):
        example = next(e for e in source if e.id == cache.ids[row])
        assert torch.equal(got, direct(example.image, encoder))
        assert torch.equal(embed, encoder.encode_prompts([example.prompt])[0]["prompt_embeds"][0])
    assert opened(open_source(str(folder)), tmp_path / "cache").dropped == cache.dropped


def test_more_than_one_percent_stops(tmp_path):
    folder = make_folder(tmp_path / "data", 199)
    spoil(folder, 20, 198)
    with pytest.raises(
        DataError, match="(?s)2 of 199 examples cannot be used.*0020.png: truncated.*0198.png: truncated"
    ) as caught:
        opened(open_source(str(folder)), tmp_path / "cache")
    assert caught.value.exit_code == 3
    assert list((tmp_path / "cache").iterdir()) == []


def test_long_lists_end_in_a_count(tmp_path):
    folder = make_folder(tmp_path / "data", 40)
    spoil(folder, *range(5, 35))
    encoder = FakeEncoder()
    with pytest.raises(DataError) as caught:
        opened(open_source(str(folder)), tmp_path / "cache", encoder)
    message = str(caught.value)
    assert "30 of 40" in message
    assert sum("truncated" in line for line in message.splitlines()) == 20
    assert "and 10 more" in message
    assert encoder.images < 6  # nothing is encoded past the limit


def test_a_bad_loser_drops_the_pair(tmp_path):
    count = 200
    cells = [picture(i) for i in range(count)]
    losers = [*cells[:-1], b"\xff\xd8 cut"]
    ones = [1.0] * count
    table = {"jpg_0": cells, "jpg_1": losers, "label_0": ones, "label_1": [0.0] * count, "caption": ["a"] * count}
    pq.write_table(pa.table(table), tmp_path / "p.parquet")
    source = open_source(str(tmp_path / "p.parquet"))
    cache = opened(source, tmp_path / "cache")
    assert len(cache) == 199
    assert cache.dropped[0].id == "p.parquet:199"
    assert cache.dropped[0].reason.startswith("loser: ")
    assert len(opened(source, tmp_path / "cache", losers=False)) == 200


def test_empty_data(tmp_path):
    empty = tmp_path / "p.parquet"
    pq.write_table(
        pa.table({"jpg_0": [b""], "jpg_1": [b""], "label_0": [0.5], "label_1": [0.5], "caption": ["a"]}), empty
    )
    with pytest.raises(DataError, match="contains no examples; 1 of 1 pair is a tie"):
        opened(open_source(str(empty)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_infinite_latents_are_refused(tmp_path):
    class Overflowing(FakeEncoder):
        def encode_images(self, images: Tensor) -> Tensor:
            return super().encode_images(images) * float("inf")

    with pytest.raises(NonFiniteError, match="latents of shapes-1-0, shapes-1-1, shapes-1-2 are not finite"):
        opened(open_source("shapes:3:1"), tmp_path / "cache", Overflowing())
    assert list((tmp_path / "cache").iterdir()) == []


# failures while building


class Failing(FakeEncoder):
    """An encoder that raises at the third batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.batches = 0

    def encode_images(self, images: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == 3:
            raise self.error
        return super().encode_images(images)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device lost"), MemoryError()])
def test_interrupted_build_leaves_nothing(tmp_path, small_shards, error):
    source = open_source(str(make_folder(tmp_path / "data", 13)))
    with pytest.raises(type(error)):
        opened(source, tmp_path / "cache", Failing(error))
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(opened(source, tmp_path / "cache")) == 13


@pytest.mark.parametrize("name", ["latents-00001.safetensors", "prompts-00001.safetensors", INDEX])
def test_full_disk_leaves_nothing(tmp_path, small_shards, monkeypatch, name):
    source = open_source(str(make_folder(tmp_path / "data", 13)))
    written: list[str] = []
    write = build.write_file

    def write_until(path: Path, content: bytes) -> None:
        if path.name == name:
            path.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(build, "write_file", write_until)
    with pytest.raises(DataError, match=r"no space left for the cache in .*cache: 0.0 MiB needed, \d+\.\d MiB free"):
        opened(source, tmp_path / "cache")
    assert written
    assert list((tmp_path / "cache").iterdir()) == []


def test_too_small_a_disk_is_refused_before_writing(tmp_path, monkeypatch):
    source = open_source(str(make_folder(tmp_path / "data", 13)))
    latents, embeds = 13 * 4 * 4 * 4 * 4, 6 * 5 * 3 * 4
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build, "write_file", lambda *_: pytest.fail("written"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=latents + embeds - 1))
    with pytest.raises(DataError, match="no space left"):
        opened(source, tmp_path / "cache")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=latents + embeds))
    assert len(opened(source, tmp_path / "cache")) == 13


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        opened(open_source("shapes:2"), tmp_path / "file" / "cache")


def test_a_cache_finished_meanwhile_is_used(tmp_path):
    source = open_source(str(make_folder(tmp_path / "data", 5)))

    class Slow(FakeEncoder):
        def encode_images(self, images: Tensor) -> Tensor:
            if not self.images:
                opened(source, tmp_path / "other")
                shutil.copytree(tmp_path / "other", tmp_path / "cache", dirs_exist_ok=True)
            return super().encode_images(images)

    cache = opened(source, tmp_path / "cache", Slow())
    assert len(cache) == 5
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.folder.name]


def test_what_a_killed_build_left_is_cleared(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    cache = tmp_path / "cache"
    names = {
        "dead and old": f".tmp-latents-0123456789abcdef-{gone.pid}",
        "dead but fresh": f".tmp-latents-1123456789abcdef-{gone.pid}",
        "alive and old": f".tmp-latents-2123456789abcdef-{os.getpid()}",
    }
    for case, name in names.items():
        (cache / name).mkdir(parents=True)
        (cache / name / "latents-00000.safetensors").write_bytes(b"half")
        if "old" in case:
            for path in (cache / name / "latents-00000.safetensors", cache / name):
                os.utime(path, (1e9, 1e9))
    opened(open_source("shapes:2"), cache)
    left = {path.name for path in cache.iterdir()}
    assert names["dead and old"] not in left
    assert {names["dead but fresh"], names["alive and old"]} < left


def test_damaged_caches_say_so(tmp_path, small_shards):
    source = open_source(str(make_folder(tmp_path / "data", 9)))
    whole = opened(source, tmp_path / "cache").folder

    def damage(name: str, content: bytes | None) -> None:
        before = (whole / name).read_bytes()
        if content is None:
            (whole / name).unlink()
        else:
            (whole / name).write_bytes(content)
        with pytest.raises(DataError, match=r"this cache is damaged: .*Delete the folder"):
            opened(source, tmp_path / "cache")
        (whole / name).write_bytes(before)

    shard = (whole / "latents-00001.safetensors").read_bytes()
    damage("latents-00001.safetensors", None)
    damage("latents-00001.safetensors", shard[:-1])
    damage("prompts-00000.safetensors", b"")
    index = json.loads((whole / INDEX).read_text())
    damage(INDEX, None)
    damage(INDEX, b'{"format_version": 2')
    damage(INDEX, b"[]")
    damage(INDEX, json.dumps(index | {"key": "another"}).encode())
    damage(INDEX, json.dumps(index | {"format_version": 1}).encode())
    assert len(opened(source, tmp_path / "cache")) == 9


def test_truncated_prompts_are_counted_once_each_and_told_at_every_opening(tmp_path):
    folder = make_folder(tmp_path / "pictures", 12)
    for name, words in (("0001", 30), ("0003", 20), ("0007", 30), ("0004", 3)):
        (folder / f"{name}.txt").write_text(" ".join(["red"] * words))
    for _ in range(2):
        lines = []
        cache = opened(open_source(str(folder)), tmp_path / "cache", report=lines.append)
        (line,) = [line for line in lines if "tokens" in line]
        assert line.startswith("2 of 8 prompts have more tokens than the text encoder accepts")
        assert line.endswith(repr(" ".join(["red"] * 30)[:80] + " ..."))
        assert sorted(map(len, cache.truncated)) == [79, 119]


def test_wrong_arguments(tmp_path):
    source = open_source("shapes:2")
    with pytest.raises(ValueError, match="resolution"):
        opened(source, tmp_path, resolution=0)
    with pytest.raises(ValueError, match="crop"):
        opened(source, tmp_path, crop="smart")
    with pytest.raises(ValueError, match="batch_size"):
        opened(source, tmp_path, batch_size=0)
