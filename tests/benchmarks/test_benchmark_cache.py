"""Tests of suite `cache`: what it compares, that every switch changes the checkpoint, what it omits and rejects."""

import gc
import mmap
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import cases as suites
from benchmarks.harness import speed, switches
from benchmarks.harness.measure import Machine
from benchmarks.harness.rows import KEYS, Row
from benchmarks.harness.switches import AHEAD, ALONE, COPY, IN_PLACE, LOAD, READ, SWITCH, Kept, StateDicts, Subject
from benchmarks.suites import cache
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import trainable_state_dict
from seppo_fast.references.resident import Resident
from tests.helpers.benchmark import MACHINE, driven, smallest_cache


@pytest.fixture
def smallest(monkeypatch):
    """Shrinks the suite to a few seconds, with a LoRA only."""
    smallest_cache(monkeypatch)
    size = cache.SIZES["quick"]
    monkeypatch.setitem(cache.SIZES, "quick", cache.Size((("lora", "fp32"),), size.kept, 1, 1, 2))


@pytest.fixture(scope="module")
def subject():
    """Returns a subject that trains all weights, with checkpoints in bf16."""
    return Subject(MACHINE, "full", "bf16", 1)


@pytest.fixture
def kept(subject, tmp_path):
    """Yields three checkpoints in files."""
    made = Kept(subject, "disk", 3, tmp_path)
    with made.pool:
        made.grow(3)
        yield made


def test_checkpoints_are_random_and_a_function_of_their_number(subject):
    first, again, other = (dict(subject.weights(index)) for index in (0, 0, 1))
    assert set(first) == set(trainable_state_dict(subject.policy))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and not torch.equal(tensor, other[name])
        assert tensor.count_nonzero() == tensor.numel()
    predictions = [subject.prediction(index) for index in (0, 1)]
    assert predictions[0].isfinite().all() and not torch.equal(*predictions)
    assert subject.holds(subject.policy, 1) and not subject.holds(subject.policy, 0)


def test_a_single_wrong_bit_is_seen(subject, capsys):
    prediction = subject.prediction(0)
    assert subject.is_right("one", subject.policy, 0, prediction)
    weight = next(iter(trainable_state_dict(subject.policy).values())).data[0, 0, 0]
    before = weight[0].clone()
    weight[0] = torch.nextafter(before, before + 1)  # in bf16 the prediction stays the same
    assert not subject.is_right("one", subject.policy, 0, prediction)
    weight[0] = before
    assert not subject.is_right("other", subject.policy, 0, prediction + 0.1)
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "full bf16, one: tensors are not those of checkpoint 0",
        "full bf16, other: predictions are not those of checkpoint 0",
    ]


def test_each_switch_is_to_another_checkpoint(subject, kept):
    """No call finds its checkpoint already resident, so each one copies; this includes a pool that has grown."""
    seen = []
    for switch in (kept.switch, kept.switch_in_place, kept.switch, kept.switch, kept.switch_in_place):
        before = kept.index
        switch()
        assert kept.index != before
        seen.append(kept.index)
        assert subject.holds(subject.reference, kept.index)  # the bound module and the switch in place share a slab
    assert seen == [1, 2, 0, 1, 2]
    assert kept.are_right() == {SWITCH: True, IN_PLACE: True}


def test_what_comes_up_is_the_next_one(subject, kept, monkeypatch):
    asked = []
    prefetch = ReferencePool.prefetch
    monkeypatch.setattr(ReferencePool, "prefetch", lambda pool, index: (asked.append(index), prefetch(pool, index)))
    for _ in range(4):
        kept.prefetch()
        kept.switch()
        assert asked[-1] == kept.index and subject.holds(subject.reference, kept.index)
    assert asked == [1, 2, 0, 1]


def test_steps_leave_the_policy_as_it_is(subject, kept, monkeypatch):
    order = []
    for owner, name in ((subject, "step"), (kept, "switch"), (kept, "prefetch")):
        monkeypatch.setattr(owner, name, recorded(order, name, getattr(owner, name)))
    providers = {provider.name: provider for provider in cache._steps(subject, kept)}
    assert list(providers) == [ALONE, SWITCH, AHEAD]
    subject.become(1)
    parts = {ALONE: ["step"], SWITCH: ["step", "switch"], AHEAD: ["prefetch", "step", "switch"]}
    for name, provider in providers.items():
        del order[:]
        provider.call()
        assert provider.value_ok and order == provider.units * parts[name]
    assert subject.holds(subject.policy, 1)
    assert all(parameter.grad is None for parameter in subject.policy.parameters())


def recorded(order, name, call):
    return lambda: (order.append(name), call())


def test_the_baselines_take_turns(subject, tmp_path):
    states = StateDicts(subject, 2, tmp_path)
    assert states.right == {LOAD: True, READ: True}  # each has loaded the first of its two
    for call in (states.load, states.read):
        for index in (1, 0, 1):
            call()
            assert subject.holds(subject.policy, index)
    strides = {name: tensor.stride() for name, tensor in trainable_state_dict(subject.policy).items()}
    assert {name: tensor.stride() for name, tensor in next(states._states).items()} == strides


def test_copies_take_turns_over_the_cache(subject, monkeypatch):
    class Small(Machine):
        cache_bytes = 3 * subject.table.size // 2

    monkeypatch.setattr(subject, "machine", Small(torch.device("cpu"), quick=True))
    copied = cache.plain_copy(subject, "host")
    made = [copied().clone() for _ in range(4)]
    assert torch.equal(made[0], made[3]) and not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    assert made[0].nbytes == subject.table.size and made[0].unique().numel() == 256


def damaged(module):
    """Changes one of the module's numbers."""
    tensor = next(iter(trainable_state_dict(module).values())).data
    tensor[(0,) * tensor.dim()] += 1
    return module


def wrong_load_into(monkeypatch):
    right = ReferencePool.load_into
    monkeypatch.setattr(
        ReferencePool, "load_into", lambda pool, module, index: (right(pool, module, index), damaged(module))
    )


def wrong_resident(monkeypatch):
    right = ReferencePool.resident

    @contextmanager
    def wrong(pool, module, index):
        with right(pool, module, index) as reference:
            yield damaged(reference)

    monkeypatch.setattr(ReferencePool, "resident", wrong)


def policy_that_does_not_come_back(monkeypatch):
    right = ReferencePool.resident

    @contextmanager
    def wrong(pool, module, index):
        with right(pool, module, index) as reference:
            yield reference
        damaged(module)

    monkeypatch.setattr(ReferencePool, "resident", wrong)


def nothing_comes_up(monkeypatch):
    def wrong(resident, slab):
        resident._ahead.zero_()  # else reused memory may still contain the right checkpoint

    monkeypatch.setattr(Resident, "_bring", wrong)


def another_file(monkeypatch):
    monkeypatch.setattr(switches, "load_file", lambda file: {})


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [(wrong_load_into, SWITCH), (wrong_resident, IN_PLACE), (policy_that_does_not_come_back, IN_PLACE)],
)
def test_a_wrong_switch_is_seen(fault, wrong, kept, monkeypatch):
    fault(monkeypatch)
    assert kept.are_right() == {SWITCH: True, IN_PLACE: True} | {wrong: False}


def test_a_wrong_baseline_is_seen(subject, tmp_path, monkeypatch):
    monkeypatch.setattr(StateDicts, "load", lambda states: None)
    assert StateDicts(subject, 2, tmp_path).right == {LOAD: False, READ: True}


def test_what_is_wrong_gets_no_ratio(smallest, tmp_path, monkeypatch, capsys):
    for fault in (wrong_resident, nothing_comes_up, another_file):
        fault(monkeypatch)
    code, rows = driven("cache", tmp_path)
    assert code == 1
    for row in rows:
        assert row["value_ok"] == (row["ratio"] is not None) == (row["provider"] not in {IN_PLACE, AHEAD, READ})
    out, err = capsys.readouterr()
    assert "lora fp32, training, switch, prefetched: tensors and predictions are not those of checkpoint" in out
    assert "DIFFER" in out and "9 rows without a ratio" in err


def test_fewer_checkpoints_where_there_is_no_room_for_more(smallest, tmp_path, monkeypatch, capsys):
    """There is room for two and a half checkpoints, if a fifth stays free; files have all the room they need."""
    slab = Subject(MACHINE, "lora", "fp32", 1).table.size
    asked = cache.Size((("lora", "fp32"),), {"iteration": 2, "update": 3}, rounds=1, pairs=1, steps=1)
    monkeypatch.setitem(cache.SIZES, "quick", asked)
    monkeypatch.setattr(cache, "free_bytes", lambda device: int(2.5 * slab / 0.8))
    code, rows = driven("cache", tmp_path)
    assert code == 0
    counts = {row["case"].split(", ")[1] for row in rows if "host memory" in row["case"]}
    assert counts == {"2 checkpoints"}
    assert "lora fp32 in host memory: 2 checkpoints instead of 3; there is no room for more" in capsys.readouterr().out


def test_a_tier_without_room_is_left_out(subject, tmp_path, monkeypatch):
    """With as many steps per call as checkpoints, a switch would find one that was loaded before."""
    steps = cache.SIZES["quick"].steps
    monkeypatch.setattr(cache, "free_bytes", lambda device: (steps + 0.5) * subject.table.size / 0.8)
    compared = cache._Compared(subject, 1.0, [], tmp_path)
    monkeypatch.setattr(cache, "_compared", lambda *arguments: compared)
    outcome = suites.run_cases(suites.chosen(cache.cases(MACHINE), ["full bf16 in host memory"]))
    assert outcome.rows == outcome.failed == [] and len(outcome.missing) == 2
    assert set(outcome.missing.values()) == {f"there is room for {steps} checkpoints; at least {steps + 1} are needed"}


def test_room_is_that_of_the_tier(subject, tmp_path, monkeypatch):
    most, size = max(cache.SIZES["quick"].kept.values()), subject.table.size
    monkeypatch.setattr(
        cache, "free_bytes", lambda device: 5.1 / 0.8 * size if device.type == "cuda" else 3.1 / 0.8 * size
    )
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**15))
    gpu = SimpleNamespace(machine=SimpleNamespace(device=torch.device("cuda"), size="quick"), table=subject.table)
    assert [cache.room_for(gpu, tier, tmp_path) for tier in ("device", "host", "disk")] == [5, 3, most]


def test_steps_are_of_as_many_pairs_as_fit(monkeypatch, capsys):
    step = Subject.step

    def short(subject):
        if subject.pairs > 1:
            raise torch.OutOfMemoryError
        step(subject)

    monkeypatch.setattr(Subject, "step", short)
    assert Subject(MACHINE, "lora", "fp32", 4).pairs == 1
    assert capsys.readouterr().out.splitlines() == [
        f"lora fp32: more than {pairs} pairs per step do not fit into memory" for pairs in (2, 1)
    ]


def test_shares_are_of_the_learning_between_two_draws():
    assert cache.pairs_between("update") == 2048 and cache.pairs_between("iteration") == 30 * 2048
    rows = [Row("cache", "case", way, LOAD, True, p50_ms=time) for way, time in ((LOAD, 300.0), (SWITCH, 30.0))]
    learning = cache.pairs_between("update") / 16 * 0.25  # steps of 16 pairs in a quarter of a second
    assert [row.share_of_step for row in cache.with_shares(rows, learning)] == pytest.approx([0.3 / 32, 0.03 / 32])


def test_copies_are_counted_where_the_device_makes_them(monkeypatch):
    """The profiler and CUDA are replaced by stand-ins."""
    names = ["Memcpy HtoD (Pinned -> Device)", "cudaMemcpyAsync", "Memcpy DtoD (Device -> Device)", "cudaLaunchKernel"]

    class Profiler:
        def __init__(self, activities):
            self.seen = []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert called == ["once", "synchronised"]

        def events(self):
            return [SimpleNamespace(name=name) for name in names]

    called = []
    monkeypatch.setattr(cache, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("synchronised"))
    assert cache.copies(lambda: called.append("once")) == 2


def test_host_memory_is_what_was_written(tmp_path):
    """It counts the process's own memory, shared or not, but not a mapped file."""
    gc.collect()
    before, size = switches.host_memory(), 2**25
    written = [mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS) for kind in (mmap.MAP_PRIVATE, mmap.MAP_SHARED)]
    for memory in written:
        memory[:: mmap.PAGESIZE] = b"x" * (size // mmap.PAGESIZE)
    assert switches.host_memory() - before == pytest.approx(2 * size, rel=0.02)
    file = tmp_path / "file"
    file.write_bytes(bytes(size))
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    assert int(mapped.sum()) == 0
    assert switches.host_memory() - before == pytest.approx(2 * size, rel=0.02)


def test_the_table_of_the_cache():
    """It shows rates and shares, and marks a share that is too small to print."""
    where = {"suite": "cache", "device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "commit": "abc1234"}
    measured = {"p50_ms": 31.0, "ratio": 12.0, "limit": "copy", "limit_fraction": 0.98, "gb_per_s": 54.3}
    rows = [
        dict.fromkeys(KEYS) | where | {"case": "full", "value_ok": True, "provider": way, **measured, **mine}
        for way, mine in ((COPY, {"share_of_step": 1e-3}), (SWITCH, {"share_of_step": 2e-5, "launches": 1.0}))
    ]
    lines = speed.speed_table(rows).splitlines()
    assert lines[0] == "| cache | | ms | x baseline | GB/s | of copy's speed | of the learning | launches |"
    assert lines[2] == "| full | plain copy | 31 | 12.00 | 54.3 | 98.0% | 0.10% | |"
    assert lines[3] == "| | switch | 31 | 12.00 | 54.3 | 98.0% | < 0.01% | 1 |"
