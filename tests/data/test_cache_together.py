"""Two processes need the same cache: one fills it while the other waits, and takes over if the first is killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.forks import Forks
from seppo_fast.data.cache import build, opening
from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import RESOLUTION, FakeEncoder, make_folder, opened

FORK = multiprocessing.get_context("fork")


class Stopping(FakeEncoder):
    """An encoder that signals the start of its third batch, then waits for permission to continue."""

    def __init__(self, begun: Any, go: Any) -> None:
        super().__init__()
        self._begun, self._go = begun, go

    def encode_images(self, images: Tensor) -> Tensor:
        if self.images == 6:
            self._begun.set()
            assert self._go.wait(60)
        return super().encode_images(images)


def fill(data: Path, folder: Path, encoder: FakeEncoder, told: Any) -> None:
    """Fills the cache in a separate process; sends its messages and finally how many images it encoded."""
    opening.say = build.say = told.put
    cache = open_or_build(open_source(str(data)), encoder, resolution=RESOLUTION, folder=folder, batch_size=3)
    told.put((encoder.images, len(cache), cache.fingerprint))


def told_by(queue: Any, wanted: Callable[[Any], bool]) -> Any:
    """Returns the next message of a process that satisfies `wanted`."""
    return next(said for said in iter(lambda: queue.get(timeout=60), None) if wanted(said))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Starts a process that pauses midway, then one that waits for it; finally kills both."""
    monkeypatch.setattr(build, "SHARD_SIZE", 4)
    torch.set_num_threads(1)  # a forked child lacks its parent's threads
    data, folder = make_folder(tmp_path / "data", 13), tmp_path / "cache"
    begun, go, first_told, second_told = FORK.Event(), FORK.Event(), FORK.Queue(), FORK.Queue()
    first = FORK.Process(target=fill, args=(data, folder, Stopping(begun, go), first_told))
    second = FORK.Process(target=fill, args=(data, folder, FakeEncoder(), second_told))
    first.start()
    assert begun.wait(60)
    second.start()
    told_by(second_told, lambda said: "another process is filling this cache" in said)
    yield first, second, go, first_told, second_told
    for process in (first, second):
        process.kill()
        process.join()


def of_one(tmp_path: Path) -> dict[str, str]:
    opened(open_source(str(tmp_path / "data")), tmp_path / "alone")
    return contents(tmp_path / "alone")


def is_end(said: Any) -> bool:
    return isinstance(said, tuple)


def test_one_fills_it_and_the_other_waits(tmp_path, two):
    first, second, go, first_told, second_told = two
    go.set()
    assert told_by(first_told, is_end)[:2] == (13, 13)
    assert told_by(second_told, is_end)[:2] == (0, 13)  # it encoded nothing
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert contents(tmp_path / "cache") == of_one(tmp_path)


def test_the_other_takes_over_when_the_first_is_killed(tmp_path, two):
    first, second, _, _, second_told = two
    assert len(list((tmp_path / "cache").glob(".tmp-*"))) == 1
    os.kill(first.pid, signal.SIGKILL)
    assert told_by(second_told, is_end)[:2] == (13, 13)
    second.join(60)
    assert second.exitcode == 0
    assert contents(tmp_path / "cache") == of_one(tmp_path)


def test_a_build_that_fails_lets_the_next_one_in(tmp_path):
    data = make_folder(tmp_path / "data", 5)
    (data / "0003.txt").unlink()
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 5 examples cannot be used"):
            opened(open_source(str(data)), tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


def test_where_files_cannot_be_locked_it_is_said(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lines: list[str] = []
    cache = opened(open_source("shapes:3"), tmp_path, report=lines.append)
    assert len(cache) == 3
    assert "cannot be locked there (No locks available); two runs may encode the same data" in lines[0]


def test_two_runs_through_the_command_line(tmp_path, tiny):
    """Runs both at once with one empty cache folder; then again, killing one while it writes."""
    config = tmp_path / "run.yaml"
    tree = {
        "model": {"path": str(tiny), "train": "lora", "lora_rank": 2, "precision": "fp32"},
        "data": {"source": "shapes:40:3", "resolution": 16},
        "train": {"updates": 1, "pairs_per_update": 2, "micro_batch": 2},
        "sampler": {"steps": 1, "batch": 2},
        "log": {"sample_every": 0},
    }
    config.write_text(json.dumps(tree))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with Forks(tmp_path / "a") as one, Forks(tmp_path / "b") as other, ThreadPoolExecutor() as pool:

        def train(forks: Forks, name: str, cache: str, fault: str = "") -> Any:
            words = ("train", config, "--output", tmp_path / name / cache, "--data.cache", tmp_path / cache)
            return pool.submit(forks.run, *words, fault=fault)

        runs = [train(one, "a", "both"), train(other, "b", "both")]
        ends = [run.result() for run in runs]
        assert [end.code for end in ends] == [0, 0], ends
        whole = contents(tmp_path / "both")
        assert len(whole) == 3
        assert len(list((tmp_path / "both").iterdir())) == 1
        runs = [train(one, "a", "killed", "cache-write@2=kill"), train(other, "b", "killed")]
        first, second = (run.result() for run in runs)
        # The first is killed, unless the other was faster and filled the cache itself.
        assert (first.code, second.code) in {(-signal.SIGKILL, 0), (0, 0)}
        assert contents(tmp_path / "killed") == whole
