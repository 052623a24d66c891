"""The placement of checkpoints, within their budgets."""

import errno
import os
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import seppo_fast.references.tiers as tiers
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.tiers import Budget, PoolFullError
from tests.helpers.pools import KEPT, Odd, assert_holds, contents, filled, same, scrambled

SLAB = PackedLayout.of(Odd()).size


@pytest.fixture
def work(tmp_path):
    """A folder for the files of a pool. Files lose their names at once, so none may be left at the end."""
    (tmp_path / "work").mkdir()
    yield tmp_path / "work"
    assert [place for place in (tmp_path / "work").rglob("*") if place.name not in ("deep", "er")] == []


def mapped_files(folder):
    """Returns the bytes, in whole pages, of each file under a folder that this process maps, named or not."""
    sizes = {}
    with open("/proc/self/maps") as maps:
        for line in maps:
            places, _, _, _, inode, *path = line.split(maxsplit=5)
            if path and path[0].startswith(f"{folder}/"):
                start, end = (int(place, 16) for place in places.split("-"))
                sizes[inode] = sizes.get(inode, 0) + end - start
    return sizes


def host_slabs(pool):
    """Returns the bytes of host memory that the pool has allocated, by address."""
    held = [*pool._tiers.stored.values(), *pool._tiers._left]
    storages = [stored.slab.untyped_storage() for stored in held if stored.tier == "host"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_checkpoints_go_down_the_tiers_and_come_back_bit_for_bit(work):
    with filled(5, budget=Budget(host=2 * SLAB + 1, disk=4 * SLAB), folder=work / "deep" / "er")[0] as pool:
        expected = {number: scrambled(Odd(), number) for number in range(5)}
        assert list(pool.tiers.values()) == ["host", "host", "disk", "disk", "disk"]
        assert_holds(pool, expected)
        assert len(mapped_files(work)) == 3
        for number in (4, 0, 3):
            module = Odd()
            with pool.resident(module, number):
                assert same(module, expected[number])


def test_without_budgets_a_share_of_what_is_free_is_taken(work, monkeypatch):
    usage = type("Usage", (), {"free": 7 * SLAB // 2})
    monkeypatch.setattr(tiers, "free_bytes", lambda device: 5 * SLAB)
    monkeypatch.setattr(tiers.shutil, "disk_usage", lambda place: usage)
    with ReferencePool(0, folder=work) as pool:
        for _ in range(2 + 3):  # half of 5, nine tenths of 3.5
            pool.add(Odd())
        assert list(pool.tiers.values()) == ["host"] * 2 + ["disk"] * 3
        with pytest.raises(PoolFullError):
            pool.add(Odd())


class Big(nn.Module):
    """A module of a little over 64 KiB, next to which a file's header is negligible."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(128, 128)
        self.norm = nn.BatchNorm1d(128)


@pytest.mark.parametrize(
    ("keep", "rule"), [(None, "reservoir"), (5, "newest"), (5, "spread"), (5, "reservoir"), (2, "spread")]
)
def test_two_hundred_random_calls_never_exceed_the_budgets_and_give_the_right_bits(work, keep, rule):
    slab = PackedLayout.of(Big()).size
    budget = Budget(host=5 * slab // 2, disk=7 * slab // 2)
    rng = np.random.default_rng(keep)
    module, other, expected, refused = Big(), Big(), [], 0
    names = tuple(contents(module))
    with ReferencePool(0, keep=keep, rule=rule, budget=budget, folder=work) as pool:
        for call in range(200):
            # The first call adds a checkpoint, and of the later ones one in eight.
            if call == 0 or rng.integers(8) == 0:
                tensors = scrambled(module, call)
                before = pool.tiers
                try:
                    assert pool.add(module) == len(expected)
                    expected.append(tensors)
                except PoolFullError:
                    assert pool.tiers == before and len(before) == 5
                    refused += 1
            index = pool.draw(call)
            if rng.integers(2):
                pool.prefetch(int(rng.integers(-1, len(expected) + 2)))
            if rng.integers(2):
                with pool.resident(other, index):
                    assert same(other, expected[index], names)
            else:
                pool.load_into(other, index)
                assert same(other, expected[index], names)
            assert sum(host_slabs(pool).values()) <= budget.host
            files = mapped_files(work)
            assert sum(files.values()) <= budget.disk
            assert len(files) == list(pool.tiers.values()).count("disk")
            assert len(pool.tiers) == min(len(expected), keep or 5)
        for number in pool.tiers:
            pool.load_into(other, number)
            assert same(other, expected[number], names)
    assert bool(refused) == (keep is None)
    assert mapped_files(work) == {}


@pytest.mark.parametrize("rule", ["newest", "spread", "reservoir"])
def test_a_full_pool_uses_the_memory_that_it_has(monkeypatch, rule):
    pool, expected = filled(4, keep=4, rule=rule, budget=Budget(host=4 * SLAB))
    taken, module = host_slabs(pool), Odd()
    assert len(taken) == 4
    monkeypatch.setattr(tiers, "host_bytes", None)  # no more host memory
    for seed in range(4, 30):
        tensors = scrambled(module, seed)
        expected[pool.add(module)] = tensors
        assert host_slabs(pool) == taken and len(pool.tiers) == 4
        assert_holds(pool, expected)


def test_a_budget_smaller_than_a_checkpoint_says_how_much_is_needed(work):
    size = PackedLayout.of(nn.Linear(1024, 1024)).size / 2**30
    pool = ReferencePool(0, budget=Budget(host=2**20, disk=0), folder=work)
    for _ in range(2):
        with pytest.raises(PoolFullError, match=rf"takes {size:.3g} GiB; room left \(GiB\): host 0.000977, disk 0"):
            pool.add(nn.Linear(1024, 1024))
        assert len(pool) == 0 and pool.tiers == {}
    assert pool.add(nn.Linear(8, 8)) == 0  # a smaller one still fits


def no_space_in_words(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


REFUSALS = [
    ("write_checkpoint", no_space_in_words, "no space left for .* MiB free"),
    ("write_checkpoint", no_space, "no space left for .* MiB free"),
    ("tempfile.mkdtemp", read_only, "cannot be written: .*Read-only"),
]


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize(("name", "refuse", "words"), REFUSALS)
def test_a_disk_that_refuses_leaves_the_pool_as_it_was(work, monkeypatch, keep, name, refuse, words):
    """Whether it is bounded or not; and it works again once there is room."""
    pool, expected = filled(3, keep=keep, rule="newest", budget=Budget(host=SLAB), folder=work)
    before, draws = pool.tiers, [pool.draw(number) for number in range(30)]
    place = tiers.tempfile if "." in name else tiers
    with monkeypatch.context() as patch:
        patch.setattr(place, name.split(".")[-1], refuse)
        for _ in range(2):
            with pytest.raises(PoolFullError, match=words):
                pool.add(Odd())
    assert pool.tiers == before and len(pool) == 3
    assert [pool.draw(number) for number in range(30)] == draws
    assert_holds(pool, expected)
    module = Odd()
    expected[3] = scrambled(module, 3)
    assert pool.add(module) == 3
    assert_holds(pool, expected)
    pool.close()


def test_a_disk_that_refuses_within_a_file_leaves_nothing_of_it(work):
    pool, expected = filled(2, budget=Budget(host=SLAB), folder=work)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SLAB // 2, limits[1]))
    try:
        with pytest.raises(PoolFullError, match="work cannot be written"):
            pool.add(Odd())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_holds(pool, expected)
    assert len(mapped_files(work)) == 1


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        pool = ReferencePool(0, budget=Budget(host=0), folder=folder)
        with pytest.raises(PoolFullError, match="file.* cannot be written"):
            pool.add(Odd())
        assert len(pool) == 0


def test_close_frees_everything_and_can_be_called_twice(work):
    pool, _ = filled(3, budget=Budget(host=SLAB), folder=work)
    module = Odd()
    pool.bind(module)
    pool.prefetch(2)
    pool.load_into(module, 1)
    expected = contents(module)
    pool.close()
    pool.close()
    assert len(pool) == 0 and pool.tiers == {} and mapped_files(work) == {}
    assert same(module, expected)  # a bound module keeps its tensors
    assert pool.add(Odd()) == 0  # and the pool can be used again


def test_an_error_in_its_block_closes_the_pool(work):
    pool, _ = filled(3, budget=Budget(host=0), folder=work)
    assert len(mapped_files(work)) == 3
    with pytest.raises(ValueError, match="index: 7"), pool:
        pool.load_into(Odd(), 7)
    assert len(pool) == 0 and mapped_files(work) == {}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_process_leaves_no_files(work):
    child = os.fork()
    if child == 0:
        try:
            filled(2, budget=Budget(host=0), folder=work)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_memory_comes_first_and_host_memory_is_pinned_and_as_large_as_a_slab(work):
    budget = Budget(device=2 * SLAB, host=2 * SLAB, disk=2 * SLAB)
    module, expected = Odd().cuda(), {}
    with ReferencePool(0, budget=budget, folder=work) as pool:
        for seed in range(6):
            source = Odd()
            expected[seed] = scrambled(source, seed)
            module.load_state_dict(source.state_dict())
            pool.add(module)
        assert list(pool.tiers.values()) == ["device"] * 2 + ["host"] * 2 + ["disk"] * 2
        slabs = [stored.slab for stored in pool._tiers.stored.values()]
        assert [slab.is_cuda for slab in slabs] == [True] * 2 + [False] * 4
        assert [slab.is_pinned() for slab in slabs[2:]] == [True] * 2 + [False] * 2
        assert all(slab.untyped_storage().nbytes() == SLAB for slab in slabs[2:4])
        for number in (5, 0, 3, 2, 4, 1):
            pool.load_into(module, number)
            assert same(module, expected[number], KEPT)
            pool.prefetch((number + 1) % 6)
            with pool.resident(module, number):
                assert same(module, expected[number], KEPT)
