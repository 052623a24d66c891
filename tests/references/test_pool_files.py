"""Saved pools: restored bit for bit, and complete or absent on disk."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import seppo_fast.references.layout as slab
import seppo_fast.references.storage as pool_files
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.tiers import Budget, PoolFullError
from seppo_fast.utils.errors import CheckpointError
from tests.helpers.pools import Odd, assert_holds, filled, scrambled

CPU = torch.device("cpu")
SLAB = PackedLayout.of(Odd()).size
NAMES = [f"checkpoint-{number:06d}.safetensors" for number in range(3)]


@pytest.fixture
def saved(tmp_path):
    pool, expected = filled(budget=Budget(host=SLAB), folder=tmp_path / "work")
    assert list(pool.tiers.values()) == ["host", "disk", "disk"]
    pool.save(tmp_path / "pool")
    pool.close()
    return tmp_path / "pool", expected


@pytest.mark.parametrize(("host", "tiers"), [(9, ["host"] * 3), (2, ["host", "host", "disk"]), (0, ["disk"] * 3)])
def test_a_saved_pool_comes_back_bit_for_bit_whatever_the_budgets(saved, tmp_path, host, tiers):
    folder, expected = saved
    with ReferencePool(0, budget=Budget(host=host * SLAB), folder=tmp_path) as pool:
        pool.restore(folder, CPU)
        shutil.rmtree(folder)  # it is not needed afterwards
        assert list(pool.tiers.values()) == tiers and len(pool) == 3
        assert_holds(pool, expected)


@pytest.mark.parametrize("like", [Odd(), None], ids=["like a module", "as it was"])
def test_a_pool_of_an_older_version_is_laid_out_anew(tmp_path, monkeypatch, like):
    """Its slabs were aligned to 128 bytes, for which cuBLASLt may choose another algorithm than for the policy."""
    monkeypatch.setattr(slab, "_ALIGNMENT", 128)
    pool, expected = filled(2)
    pool.save(tmp_path / "pool")
    assert any(slot.offset % 512 for slot in pool._tiers.layout.slots)
    pool.close()
    monkeypatch.undo()
    with ReferencePool(0) as pool:
        pool.restore(tmp_path / "pool", CPU, like)
        assert not any(slot.offset % 512 for slot in pool._tiers.layout.slots)
        assert_holds(pool, expected)
        pool.save(tmp_path / "again", tmp_path / "pool")  # links the files of the older version
    with ReferencePool(0) as pool:
        pool.restore(tmp_path / "again", CPU, like)
        assert_holds(pool, expected)


@pytest.mark.parametrize("saved_as", ["channels last", "both ways"])
def test_a_restored_pool_lies_in_memory_as_it_is_asked_to(tmp_path, saved_as):
    def layer(seed, memory_format):
        torch.manual_seed(seed)
        return nn.Conv2d(3, 5, 3).to(memory_format=memory_format)

    pool = ReferencePool(0)
    for seed in range(2):
        pool.add(layer(seed, torch.channels_last))
    pool.save(tmp_path / "first")
    last = tmp_path / "first"
    if saved_as == "both ways":
        pool = ReferencePool(0)
        pool.restore(last, CPU, layer(9, torch.contiguous_format))
        pool.add(layer(2, torch.contiguous_format))
        last = tmp_path / "second"
        pool.save(last, previous=tmp_path / "first")  # two of its files are links to the first folder's
    plain = layer(9, torch.contiguous_format)
    restored = ReferencePool(0)
    restored.restore(last, CPU, plain)
    for number in restored.tiers:
        with restored.resident(plain, number):
            assert plain.weight.stride() == (27, 9, 3, 1)
            assert torch.equal(plain.weight, layer(number, torch.contiguous_format).weight)
    with pytest.raises(CheckpointError, match="different modules"):
        ReferencePool(0).restore(last, CPU, nn.Conv2d(3, 4, 3))


def test_a_pool_that_fits_nowhere_stays_empty(saved, tmp_path):
    with ReferencePool(0, budget=Budget(host=SLAB, disk=SLAB), folder=tmp_path) as pool:
        with pytest.raises(PoolFullError, match="a checkpoint takes"):
            pool.restore(saved[0], CPU)
        assert len(pool) == 0 and pool.tiers == {}
        assert sorted(os.listdir(tmp_path)) == ["pool", "work"]


@pytest.mark.parametrize("rule", ["newest", "spread", "reservoir"])
def test_a_restored_pool_goes_on_as_the_first_one_does(tmp_path, rule):
    first, _ = filled(9, keep=4, rule=rule)
    first.save(tmp_path / "pool")
    second = ReferencePool(0, keep=4, rule=rule)
    second.restore(tmp_path / "pool", CPU)
    for number in range(9, 20):
        assert [first.draw(one) for one in range(50)] == [second.draw(one) for one in range(50)]
        assert first.add(Odd()) == second.add(Odd()) == number
        assert first.tiers == second.tiers


def test_the_manifest_says_what_there_is(saved):
    folder, _ = saved
    tree = json.loads((folder / "manifest.json").read_text())
    assert (tree["format"], tree["count"]) == (1, 3)
    assert sorted(os.listdir(folder)) == [*NAMES, "manifest.json"]
    for number, row in enumerate(tree["members"]):
        content = (folder / NAMES[number]).read_bytes()
        checksum = hashlib.sha256(content).hexdigest()
        assert row == {"number": number, "file": NAMES[number], "size": len(content), "sha256": checksum}


def test_what_was_saved_before_is_linked_and_stays_when_the_first_folder_goes(saved, tmp_path):
    before, expected = saved
    with ReferencePool(0) as pool:
        pool.restore(before, CPU)
        module = Odd()
        expected[3] = scrambled(module, 3)
        pool.add(module)
        pool.save(tmp_path / "after", before)
    for name in NAMES:
        assert os.path.samefile(before / name, tmp_path / "after" / name)
    shutil.rmtree(before)
    with ReferencePool(0) as pool:
        pool.restore(tmp_path / "after", CPU)
        assert len(pool) == 4
        assert_holds(pool, expected)


def test_where_there_are_no_links_files_are_copied(saved, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    with ReferencePool(0) as pool:
        pool.restore(saved[0], CPU)
        pool.save(tmp_path / "after", saved[0])
    for name in [*NAMES, "manifest.json"]:
        assert not os.path.samefile(saved[0] / name, tmp_path / "after" / name)
        assert (saved[0] / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_a_folder_that_exists_is_left_alone(saved, tmp_path):
    folder, _ = saved
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    pool, _ = filled(1)
    for previous, named in ((None, "pool"), (tmp_path / "none", "none")):
        with pytest.raises(CheckpointError, match=named):
            pool.save(tmp_path / "new" if previous else folder, previous)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    assert sorted(os.listdir(tmp_path)) == ["pool", "work"]


def no_space(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_full_disk_leaves_nothing_half_saved(tmp_path, monkeypatch):
    pool, expected = filled()
    monkeypatch.setattr(pool_files, "save_file", no_space)
    with pytest.raises(CheckpointError, match="no space left"):
        pool.save(tmp_path / "pool")
    monkeypatch.undo()
    # And a disk that really refuses a write in the middle of a file.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SLAB // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            pool.save(tmp_path / "pool")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
    assert_holds(pool, expected)


def killed_at_line(save, line):
    """Kills this process when `save` reaches its `line`th line of Python."""
    lines = iter(range(line))

    def trace(*_):
        if next(lines, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    save()


def killed_after(save, seconds):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    save()


def counts_lines(save, file):
    """Writes to a file how many lines of Python `save` runs."""
    lines = 0

    def trace(*_):
        nonlocal lines
        lines += 1
        return trace

    sys.settrace(trace)
    save()
    sys.settrace(None)
    file.write_text(str(lines))


def died(kill, *args):
    """Returns whether a child process that calls `kill(*args)` is killed before the call returns."""
    child = os.fork()
    if child == 0:
        try:
            kill(*args)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_save_that_is_killed_leaves_a_whole_folder_or_none(tmp_path):
    """Kills it at 40 lines of Python, from the first to well after the folder has its name, and at 20 moments."""
    pool, expected = filled()
    started = time.perf_counter()
    pool.save(tmp_path / "first")
    took = time.perf_counter() - started
    assert not died(counts_lines, lambda: pool.save(tmp_path / "second"), tmp_path / "lines")
    lines, rng = int((tmp_path / "lines").read_text()), random.Random(0)
    kills = [(killed_at_line, line) for line in rng.sample(range(lines), 20)]
    kills += [(killed_at_line, lines - back) for back in range(5, 105, 5)]
    kills += [(killed_after, rng.uniform(0.01, 1) * took) for _ in range(20)]
    found = []
    for number, (kill, when) in enumerate(kills):
        folder = tmp_path / f"pool-{number}"
        found.append((died(kill, lambda folder=folder: pool.save(folder), when), folder.exists()))
        if folder.exists():
            with ReferencePool(0) as restored:
                restored.restore(folder, CPU)
                assert_holds(restored, expected)
    assert found.count((True, False)) >= 20 and found.count((True, True)) >= 1
