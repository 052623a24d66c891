"""Caches of clips hold the chosen frames' latents, keyed by all that changes them; image caches are unchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from seppo_fast.data.cache import build
from seppo_fast.data.cache.latents import INDEX, LatentCache
from seppo_fast.data.cache.opening import cache_key, open_or_build
from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.frames import choose_frames
from seppo_fast.data.remarks import Remarks
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import Source, open_source
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import heard, quiet
from tests.helpers.calls import embeds
from tests.helpers.clips import frame_numbers, numbered_frames, write_clip

FRAMES, RESOLUTION = 4, 16


class ClipEncoder:
    """An encoder: latents (3, F, 16, 16) are the clip itself, and embeddings (2, 3) hold the prompt's length."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode_images(self, clips: Tensor) -> Tensor:
        assert clips.dtype == torch.uint8
        assert clips.shape[2:] == (RESOLUTION, RESOLUTION, 3)
        self.batches.append(len(clips))
        return clips.permute(0, 4, 1, 2, 3).half()

    collate = staticmethod(Conditioning.cat)

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        return [embeds(torch.full((1, 2, 3), float(len(prompt))).half()) for prompt in prompts]

    def too_long(self, prompts: list[str]) -> list[str]:
        return []

    def fingerprint(self) -> dict[str, str]:
        return {"vae": "fake"}


def opened(source: Source, folder: Path, report: Callable[[str], object] = quiet, **options: object) -> LatentCache:
    options = {"resolution": RESOLUTION, "frames": FRAMES, "encoder": ClipEncoder()} | options
    return heard(report, lambda: open_or_build(source, folder=folder, **options))


def pixels(latent: Tensor) -> np.ndarray:
    return latent.permute(1, 2, 3, 0).numpy().astype(np.uint8)


def make_clips(folder: Path, lengths: list[int]) -> Path:
    """Writes clips and their csv; clip i is a time-lapse if i is even."""
    for i, length in enumerate(lengths):
        write_clip(folder / f"clip{i}.mp4", numbered_frames(length))
    rows = [f"clip{i},caption {i % 2},{i % 2}" for i in range(len(lengths))]
    (folder / "list.csv").write_text("\n".join(["videoid,name,is_transmit", *rows]))
    return folder


def test_the_chosen_frames_are_cached(tmp_path):
    source = open_source(str(make_clips(tmp_path / "d", [30, 30, 7, 3, 50])))
    lines: list[str] = []
    cache = opened(source, tmp_path / "cache", report=lines.append)
    assert cache.latent_shape == (3, FRAMES, RESOLUTION, RESOLUTION)
    assert cache.prompts == ["caption 0", "caption 1"] * 2 + ["caption 0"]
    chosen = [frame_numbers(pixels(latent)) for latent in cache.winners(range(5))]
    assert chosen[0] == [0, 10, 19, 29]
    assert chosen[4] == [0, 16, 33, 49]
    assert chosen[2] == [0, 2, 4, 6]
    assert chosen[1] == choose_frames(30, FRAMES, whole=False, key="clip1")
    assert np.diff(chosen[1]).tolist() == [4, 4, 4]
    assert chosen[3] == [0, 0, 1, 2]
    assert cache.remarks == {"repeating": ["clip3"]}  # no window has frames closer together than usual
    assert lines[0].endswith("encoding 5 examples at 4 x 16 x 16")
    assert lines[-1] == "1 of 5 clips has too few frames to choose 4 different ones and repeats some: clip3"
    again = ClipEncoder()
    second = opened(open_source(str(tmp_path / "d")), tmp_path / "cache", encoder=again)
    assert (again.batches, second.remarks) == ([], {"repeating": ["clip3"]})
    assert torch.equal(second.winners([4, 1]), cache.winners([4, 1]))


def test_clips_with_a_smaller_stride_are_counted(tmp_path, capsys):
    """Windows of 4 frames at stride 4 span 13 frames."""
    folder = tmp_path / "d"
    for name, length in {"a": 13, "b": 12, "c": 4, "d": 3, "e": 12}.items():
        write_clip(folder / f"{name}.mp4", numbered_frames(length))
    rows = ["a,x,1", "b,x,1", "c,x,1", "d,x,1", "e,a time-lapse,0", "a,x,1"]
    (folder / "list.csv").write_text("\n".join(["videoid,name,is_transmit", *rows]))
    expected = [
        "1 row of list.csv repeats an earlier row's clip and caption and is not used: line 7",
        "1 of 5 clips has too few frames to choose 4 different ones and repeats some: d",
        "2 of 5 clips are too short for 4 frames at the usual spacing and use frames closer together: b, c",
    ]
    lines: list[str] = []
    cache = opened(open_source(str(folder)), tmp_path / "cache", report=lines.append)
    assert (cache.remarks, cache.dropped) == ({"repeating": ["d"], "closer": ["b", "c"]}, [])
    assert [line for line in lines if " of " in line and "encod" not in line] == expected
    remarks = Remarks(RESOLUTION)
    assert scan(open_source(str(folder)), frames=FRAMES, remarks=remarks) == []
    assert remarks.of(list("abcde")) == cache.remarks


def test_a_csv_calls_files_of_other_kinds_what_they_are(tmp_path):
    folder = make_clips(tmp_path / "d", [5])
    (folder / "moving.gif").write_bytes(b"GIF89a")
    rows = ["clip0,a,0", "moving,a,0", "moving.gif,a,0", "gone,a,0"]
    (folder / "list.csv").write_text("\n".join(["videoid,name,is_transmit", *rows]))
    reasons = [problem.reason for problem in open_source(str(folder)).problems]
    assert reasons[:2] == ["moving.gif is not a clip: none of .mp4, .mov, .m4v, .webm, .mkv, .avi"] * 2
    assert reasons[2].startswith("the file is missing")


@pytest.mark.parametrize(("limit", "size"), [(1 << 27, 1024), (3 * 4 * 16 * 16 * 2 * 2, 2), (1, 1)])
def test_shards_of_clips_are_limited_by_bytes(tmp_path, monkeypatch, limit, size):
    monkeypatch.setattr(build, "CLIP_SHARD_BYTES", limit)
    source = open_source("shapes-motion:5:1")
    cache = opened(source, tmp_path / "cache")
    assert len(list(cache.folder.glob("latents-*"))) == -(-5 // size)
    assert len(list(cache.folder.glob("prompts-*"))) == 1
    index = json.loads((cache.folder / INDEX).read_text())
    assert (index["shard_size"], index["latent_shard_size"]) == (1024, size)
    for row in (4, 0, 3):
        example = source[row]
        direct = load_clip(example, "x", example.image.open(), RESOLUTION, FRAMES).pixels
        np.testing.assert_array_equal(pixels(cache.winners([4, row])[1]), direct)


@pytest.mark.parametrize(("batch_size", "batches"), [(8, [2, 2, 1]), (3, [1] * 5), (100, [5])])
def test_a_clip_counts_as_its_frames_in_a_batch(tmp_path, batch_size, batches):
    encoder = ClipEncoder()
    opened(open_source("shapes-motion:5:1"), tmp_path, encoder=encoder, batch_size=batch_size)
    assert encoder.batches == batches


def test_flip_mirrors_half_of_the_clips(tmp_path):
    source = open_source("shapes-motion:24:1")
    plain = opened(source, tmp_path).winners(range(24))
    flipped = opened(source, tmp_path, flip=True).winners(range(24))
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    assert all(one or other for one, other in zip(same, mirrored, strict=True))
    assert 4 <= sum(mirrored) <= 20


def test_keys_of_image_caches_are_what_they_were(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"picture %d" % i)
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    (tmp_path / "alone.txt").write_text("x")
    digest = open_source(str(tmp_path)).digest()
    assert digest == "0a59986d213e96ca5d5f37a3cbe9e554a2919d08b8105cc33e9b7bf914fca684"
    parts = {"fingerprint": {"vae": "1", "dtype": "torch.float16"}, "resolution": 512, "crop": "center"}
    key = "e5a7cbd71734160107eaa1fb12afa8c577eb981e1d90bdd2699994071649952c"
    assert cache_key(digest, losers=False, **parts, format_version=2) == key
    key = cache_key(digest, losers=False, **parts)
    assert key == "380ab3c00f6bff0c7cdec69fbb404b480893bbd5dccf332ca56df8875b0917a1"
    others = [cache_key(digest, losers=False, frames=frames, **parts) for frames in (16, 8)]
    others.append(cache_key(digest, losers=False, frames=16, flip=True, **parts))
    assert len({key, *others}) == 4


def test_the_index_of_an_image_cache_is_what_it_was(tmp_path):
    class ImageEncoder(ClipEncoder):
        def encode_images(self, images: Tensor) -> Tensor:
            return images.permute(0, 3, 1, 2).half()

    cache = opened(open_source("shapes:3:1"), tmp_path, frames=None, encoder=ImageEncoder())
    index = json.loads((cache.folder / INDEX).read_text())
    assert not {"latent_shard_size", "remarks"} & index.keys()
    assert cache.remarks == {}
    assert len(cache.winners([2])) == 1


def test_what_an_older_cache_of_clips_says(tmp_path):
    source = open_source(str(make_clips(tmp_path / "d", [30, 3])))
    folder = opened(source, tmp_path / "cache").folder
    index = json.loads((folder / INDEX).read_text())
    assert index.pop("remarks") == {"repeating": ["clip1"]}
    (folder / INDEX).write_text(json.dumps(index | {"repeating": [], "closer": ["clip0", "clip1"]}))
    lines: list[str] = []
    assert opened(source, tmp_path / "cache", report=lines.append).remarks == {"closer": ["clip0", "clip1"]}
    assert lines[-1].startswith("2 of 2 clips are too short for 4 frames")


def test_images_and_clips_are_not_taken_for_each_other(tmp_path):
    with pytest.raises(DataError, match="shapes-motion:3 holds clips.*set model.motion_adapter"):
        opened(open_source("shapes-motion:3"), tmp_path, frames=None)
    with pytest.raises(DataError, match="shapes:3 holds images.*leave model.motion_adapter empty"):
        opened(open_source("shapes:3"), tmp_path)
    with pytest.raises(ValueError, match="frames must be positive, got 0"):
        opened(open_source("shapes-motion:3"), tmp_path, frames=0)
    with pytest.raises(ValueError, match="flip applies to clips only"):
        opened(open_source("shapes:3"), tmp_path, frames=None, flip=True)
    assert list(tmp_path.iterdir()) == []


def test_up_to_one_percent_of_bad_clips_is_left_out(tmp_path):
    folder = make_clips(tmp_path / "d", [5])
    for i in range(1, 100):
        shutil.copy(folder / "clip0.mp4", folder / f"clip{i}.mp4")
    rows = [f"clip{i},caption,0" for i in range(100)]
    (folder / "list.csv").write_text("\n".join(["videoid,name,is_transmit", *rows]))
    (folder / "clip40.mp4").write_text("a web page in place of a clip")
    lines: list[str] = []
    cache = opened(open_source(str(folder)), tmp_path / "cache", report=lines.append)
    assert len(cache) == 99
    assert [(problem.id, problem.reason.split(" (")[0]) for problem in cache.dropped] == [("clip40", "not a video")]
    assert any(line.startswith("left out: clip40: not a video") for line in lines)
    (folder / "clip41.mp4").unlink()
    with pytest.raises(DataError, match="(?s)2 of 100 examples cannot be used.*clip41: the file is missing.*clip40"):
        opened(open_source(str(folder)), tmp_path / "cache")
