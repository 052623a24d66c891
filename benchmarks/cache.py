"""Suite `cache`: a reference becomes another past policy, from the device's memory, the host's, or mapped files.

`switch` is `ReferencePool.load_into` of a bound module; `switch, in place` enters and leaves `ReferencePool.resident`,
as the trainer does. The baseline is `load_state_dict` from host memory, in float32 and with the module's own strides;
`from a file` has safetensors read it first. A `plain copy` moves as many bytes as a switch does: on a GPU from pinned
memory, or within its own where the checkpoints lie there. Its rate in the same rounds is the limit. GB/s count a
checkpoint's bytes once. All take turns over random checkpoints; files are in the system's cache, a LoRA's in a GPU's.

Checked before anything is timed, bit for bit: the tensors, rounded to the dtypes in which they are kept, and the
predictions against those of the policy with the same weights in float32.

`share_of_step` is the time of a switch over that of the learner's forward and backward, measured in the same run, on
all pairs between two draws: 2048 an update on one GPU, and 30 updates where a reference is drawn per iteration. The
reference's samples and errors come on top, so that of a whole run the share is less.

The last case of a tier is training steps with a switch after each, and with the next checkpoint coming up during each:
what they take beyond `no switch` is what is seen of draws as frequent as that. `launches` counts copies too.

Without a GPU all copies are within the host's memory; only ratios mean something then.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.measure import Bench, Limit, Machine, Provider, interleaved
from benchmarks.rows import Row
from benchmarks.switches import AHEAD, ALONE, COPY, IN_PLACE, LOAD, READ, SWITCH, Kept, StateDicts, Subject
from seppo_fast.config import TrainConfig
from seppo_fast.memory import free_bytes
from seppo_fast.pool_files import Tier

_PLACES: dict[Tier, str] = {"device": "GPU memory", "host": "host memory", "disk": "files"}
_ROOM = 0.8  # of what is free, for the checkpoints of a tier
_CALL_BYTES = 2**26  # that a timed call of switches copies, or all checkpoints once


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        models: `model.train` and `model.precision`.
        kept: checkpoints, by `reference.redraw`.
        rounds: of timing.
        pairs: of a training step.
        steps: in a call; fewer than checkpoints, so that no switch finds what an earlier one has brought up.
    """

    models: tuple[tuple[str, str], ...]
    kept: Mapping[str, int]
    rounds: int
    pairs: int
    steps: int


_KEPT = {"iteration": 7, "update": 20}
_CPU_MODELS = (("full", "fp32"), ("full", "bf16"), ("lora", "fp32"))
SIZES = {
    "gpu": Size((("full", "bf16"), ("lora", "bf16")), _KEPT, rounds=5, pairs=16, steps=4),
    "cpu": Size(_CPU_MODELS, _KEPT, rounds=15, pairs=4, steps=4),
    "quick": Size(_CPU_MODELS, _KEPT, rounds=3, pairs=1, steps=2),
}


def rows(machine: Machine) -> list[Row]:
    """All rows of the suite."""
    made: list[Row] = []
    size, gpu = SIZES[machine.size], machine.device.type == "cuda"
    for train, precision in size.models:
        subject = Subject(machine, train, precision, size.pairs)
        (seconds,) = interleaved(machine, [subject.step], size.rounds)
        with tempfile.TemporaryDirectory() as name:
            loads = _baselines(subject, Path(name))
            for tier in _PLACES:
                if gpu or tier != "device":
                    made += _tier_rows(subject, float(np.median(seconds)), loads, tier, Path(name))
    return made


def _tier_rows(subject: Subject, step_seconds: float, loads: list[Provider], tier: Tier, folder: Path) -> list[Row]:
    """The cases of one kind of checkpoints in one tier."""
    machine, size = subject.machine, SIZES[subject.machine.size]
    room, where = room_for(subject, tier, folder), f"{subject.name} in {_PLACES[tier]}"
    if room <= size.steps:
        print(f"{where}: left out, there is room for {room} checkpoints")
        return []
    calls = min(room, *size.kept.values(), math.ceil(_CALL_BYTES / subject.table.size))
    plain = repeated(plain_copy(subject, tier), calls)
    bench = Bench(machine, "cache", Limit("copy", where, plain, calls * subject.table.size))
    kept = Kept(subject, tier, room, folder)
    with kept.pool:
        for redraw, asked in size.kept.items():
            count = min(asked, room)
            if count < asked:
                print(f"{where}: {count} checkpoints instead of {asked}, there is no room for more")
            kept.grow(count)
            providers = [*loads, Provider(COPY, plain, calls, moved_bytes=subject.table.size)]
            case, before = f"{where}, {count} checkpoints, a draw per {redraw}", len(bench.rows)
            bench.case(case, [*providers, *_switches(subject, kept, tier, calls)], size.rounds)
            learning = pairs_between(redraw) / subject.pairs * step_seconds
            bench.rows[before:] = with_shares(bench.rows[before:], learning)
            switch = next(row for row in bench.rows[before:] if row.provider == SWITCH)
            print(f"{case}: {_in_words(subject, kept, switch)}")
        if tier == "disk" or (tier == "host" and machine.device.type == "cuda"):  # else nothing needs to come up
            bench.case(f"{where}, steps of {subject.pairs} pairs", _steps(subject, kept), size.rounds)
    return bench.rows[1:]  # the limit is a provider of each case


def with_shares(rows: list[Row], learning: float) -> list[Row]:
    """Rows whose `share_of_step` is their time's share of so many seconds of learning."""
    return [replace(row, share_of_step=None if row.p50_ms is None else row.p50_ms / 1e3 / learning) for row in rows]


def _in_words(subject: Subject, kept: Kept, switch: Row) -> str:
    """What the table does not show."""
    payload = len(kept.pool) * subject.table.payload
    return (
        f"{payload / 1e6:.4g} MB of tensors, host memory grew by {kept.host_bytes / payload:.4f} of that; "
        f"a switch takes {switch.share_of_step:.2g} of the learning's time"
    )


def room_for(subject: Subject, tier: Tier, folder: Path) -> int:
    """How many checkpoints a tier may hold here, the most that are asked for."""
    if tier == "disk":
        free = shutil.disk_usage(folder).free
    else:
        free = free_bytes(subject.machine.device if tier == "device" else torch.device("cpu"))
    return min(max(SIZES[subject.machine.size].kept.values()), int(_ROOM * free) // subject.table.size)


def pairs_between(redraw: str) -> int:
    """Pairs that the learner takes between two draws in the paper's setting, on one device."""
    paper = TrainConfig()
    return paper.pairs_per_update * (paper.updates_per_iteration if redraw == "iteration" else 1)


def plain_copy(subject: Subject, tier: Tier) -> Callable[[], object]:
    """Copies one after another of some random slabs, as large as a checkpoint, to the device."""
    size, device = subject.table.size, subject.machine.device
    sources = [torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(_turns(subject, size))]
    if device.type == "cuda" and tier != "device":
        sources = [torch.empty(size, dtype=torch.uint8, pin_memory=True).copy_(source) for source in sources]
    copied, turns = torch.empty(size, dtype=torch.uint8, device=device), itertools.cycle(sources)
    return lambda: copied.copy_(next(turns), non_blocking=True)


def repeated(once: Callable[[], object], calls: int) -> Callable[[], None]:
    """A call that makes some."""

    def call() -> None:
        for _ in range(calls):
            once()

    return call


def _turns(subject: Subject, nbytes: int) -> int:
    """How many sources of so many bytes take turns: as many as leave none in the cache, or as checkpoints."""
    most = max(SIZES[subject.machine.size].kept.values())
    return min(most, max(2, math.ceil(2 * subject.machine.cache_bytes / nbytes)))


def _baselines(subject: Subject, folder: Path) -> list[Provider]:
    """The usual ways, the same beside all tiers; counted once, since at true size that takes seconds."""
    states = StateDicts(subject, _turns(subject, subject.nbytes), folder)
    ways = {LOAD: states.load, READ: states.read}
    nbytes = subject.nbytes
    return [_provider(subject, way, once, 1, nbytes, nbytes, states.right[way]) for way, once in ways.items()]


def _switches(subject: Subject, kept: Kept, tier: Tier, calls: int) -> list[Provider]:
    """Both kinds of switch, `calls` of them at a time."""
    size, right = subject.table.size, kept.are_right()
    held = size + (len(kept.pool) * size if tier == "device" else 0)
    ways = {SWITCH: kept.switch, IN_PLACE: kept.switch_in_place}
    return [_provider(subject, way, once, calls, size, held, right[way]) for way, once in ways.items()]


def _provider(
    subject: Subject, way: str, once: Callable[[], object], calls: int, moved: int, held: int, right: bool
) -> Provider:
    """A way to switch, counted.

    Args:
        subject: what is switched.
        way: its name.
        once: one switch.
        calls: of it, in a timed call.
        moved: bytes that it copies.
        held: bytes of device memory that it needs all the time.
        right: whether its values are.
    """
    machine = subject.machine
    once()
    kernels = launches(machine, once)
    return Provider(
        way,
        repeated(once, calls),
        units=calls,
        moved_bytes=moved,
        value_ok=right,
        launches=None if kernels is None else kernels + copies(once),
        host_syncs=host_syncs(machine, once),
        peak_bytes=peak_bytes(machine, once, allocated(machine) - held),
    )


def copies(call: Callable[[], object]) -> int:
    """Copies to, from or within a GPU's memory, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.name.startswith("Memcpy") for event in profiler.events())


def _steps(subject: Subject, kept: Kept) -> list[Provider]:
    """Training steps: alone, with a switch after each, with the next checkpoint coming up during each."""

    def with_switch() -> None:
        subject.step()
        kept.switch()

    def with_prefetch() -> None:
        kept.prefetch()
        with_switch()

    steps, made = SIZES[subject.machine.size].steps, []
    for way, once in {ALONE: subject.step, SWITCH: with_switch, AHEAD: with_prefetch}.items():
        call = repeated(once, steps)
        call()
        prediction = subject.prediction(kept.index)
        right = way == ALONE or subject.is_right(f"training, {way}", subject.reference, kept.index, prediction)
        made.append(Provider(way, call, units=steps, pairs=subject.pairs, value_ok=right))
    return made
