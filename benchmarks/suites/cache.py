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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.harness.estimates import PICTURE, STEP_LAUNCHES, h200
from benchmarks.harness.measure import Bench, Limit, Machine, Provider, interleaved
from benchmarks.harness.rows import Row
from benchmarks.harness.switches import AHEAD, ALONE, COPY, IN_PLACE, LOAD, READ, SWITCH, Kept, StateDicts, Subject
from seppo_fast.config.schema import TrainConfig
from seppo_fast.references.storage import Tier
from seppo_fast.utils.memory import free_bytes

_PLACES: dict[Tier, str] = {"host": "host memory", "device": "GPU memory", "disk": "files"}
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
# Seconds on an H200 by `estimate`: of all weights 19 to 51 a case and 45 for what they share, of a LoRA 5 to 16 and 10.
SIZES = {
    "gpu": Size((("full", "bf16"), ("lora", "bf16")), _KEPT, rounds=5, pairs=16, steps=4),
    "cpu": Size(_CPU_MODELS, _KEPT, rounds=15, pairs=4, steps=4),
    "quick": Size(_CPU_MODELS, _KEPT, rounds=3, pairs=1, steps=2),
}

# What an H200 and its host are assumed to take, in seconds: a checkpoint of all weights to each tier; a round of both
# baselines, of which one reads a file; and what is made once. Of a LoRA, 3 MB, only the host's work is left.
_ADDED: dict[Tier, float] = {"device": 0.2, "host": 1.0, "disk": 2.5}
_BASELINES, _LORA_BASELINES = 3.0, 0.2
_SUBJECT, _STATES = 5.0, 40.0


def estimate(train: str, tier: Tier, added: int) -> float:
    """Returns seconds on an H200 for a case that adds so many checkpoints, see `benchmarks.harness.estimates`."""
    full, rounds = train == "full", SIZES["gpu"].rounds
    return 3.0 + rounds * (_BASELINES if full else _LORA_BASELINES) + added * (_ADDED[tier] if full else 0.1)


def estimate_steps(train: str) -> float:
    """Returns seconds on an H200 for the case of training steps."""
    size = SIZES["gpu"]
    step = h200(bf16=2 * size.pairs * PICTURE.trained[train], launches=STEP_LAUNCHES[train])
    return 3 * (1 + size.rounds) * size.steps * step


@dataclass(frozen=True)
class _Compared:
    """What the cases of one kind of checkpoints share: the subject, seconds of its step, baselines, a folder."""

    subject: Subject
    step_seconds: float
    loads: list[Provider]
    folder: Path


@dataclass(frozen=True)
class _InTier:
    """What the cases of one tier share.

    Attributes:
        bench: whose limit is `plain`.
        kept: the checkpoints.
        room: for how many.
        plain: copies as much as `calls` switches do.
        calls: switches of a timed call.
    """

    bench: Bench
    kept: Kept
    room: int
    plain: Callable[[], None]
    calls: int


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases: the host's memory first, since past policies come to lie there."""
    size, gpu, made = SIZES[machine.size], machine.device.type == "cuda", []
    for train, precision in size.models:
        full = train == "full"
        compared = Shared(partial(_compared, machine, train, precision), (_SUBJECT + _STATES) if full else 2 * _SUBJECT)
        for tier in _PLACES if gpu else ("host", "disk"):
            where = f"{train} {precision} in {_PLACES[tier]}"
            in_tier = Shared(partial(_in_tier, compared, tier, where), needs=(compared,))
            before = 0
            for redraw, count in size.kept.items():
                made.append(
                    suites.Case(
                        f"{where}, {count} checkpoints, a draw per {redraw}",
                        partial(_switch_rows, compared, in_tier, tier, where, redraw),
                        estimate(train, tier, count - before),
                        (compared, in_tier),
                    )
                )
                before = count
            if tier == "disk" or (tier == "host" and gpu):  # else nothing needs to come up
                title = f"{where}, steps of {size.pairs} pairs"
                run = partial(_step_rows, compared, in_tier, where)
                made.append(suites.Case(title, run, estimate_steps(train), (compared, in_tier)))
    return made


def _compared(machine: Machine, train: str, precision: str, stack: ExitStack) -> _Compared:
    size = SIZES[machine.size]
    subject = Subject(machine, train, precision, size.pairs)
    (seconds,) = interleaved(machine, [subject.step], size.rounds)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return _Compared(subject, float(np.median(seconds)), _baselines(subject, folder), folder)


def _in_tier(compared: Shared[_Compared], tier: Tier, where: str, stack: ExitStack) -> _InTier:
    """The tier's empty pool, and the copy beside it.

    Raises:
        LeftOut: there is room for too few checkpoints.
    """
    subject, folder = compared().subject, compared().folder
    size, room = SIZES[subject.machine.size], room_for(subject, tier, folder)
    if room <= size.steps:
        raise suites.LeftOut(f"there is room for {room} checkpoints")
    calls = min(room, *size.kept.values(), math.ceil(_CALL_BYTES / subject.table.size))
    plain = repeated(plain_copy(subject, tier), calls)
    bench = Bench(subject.machine, "cache", Limit("copy", where, plain, calls * subject.table.size))
    kept = Kept(subject, tier, room, folder)
    stack.enter_context(kept.pool)
    return _InTier(bench, kept, room, plain, calls)


def _switch_rows(
    compared: Shared[_Compared], in_tier: Shared[_InTier], tier: Tier, where: str, redraw: str
) -> list[Row]:
    """The rows of switches among as many checkpoints as a way to draw keeps."""
    subject, place = compared().subject, in_tier()
    size = SIZES[subject.machine.size]
    count = min(size.kept[redraw], place.room)
    if count < size.kept[redraw]:
        print(f"{where}: {count} checkpoints instead of {size.kept[redraw]}, there is no room for more")
    place.kept.grow(count)
    copied = Provider(COPY, place.plain, place.calls, moved_bytes=subject.table.size)
    providers = [*compared().loads, copied, *_switches(subject, place.kept, tier, place.calls)]
    case = f"{where}, {count} checkpoints, a draw per {redraw}"
    rows = place.bench.case(case, providers, size.rounds)
    rows = with_shares(rows, pairs_between(redraw) / subject.pairs * compared().step_seconds)
    switch = next(row for row in rows if row.provider == SWITCH)
    print(f"{case}: {_in_words(subject, place.kept, switch)}")
    return rows


def _step_rows(compared: Shared[_Compared], in_tier: Shared[_InTier], where: str) -> list[Row]:
    """The rows of training steps with a switch after each, among as many checkpoints as there are, or the fewest."""
    subject, place = compared().subject, in_tier()
    size = SIZES[subject.machine.size]
    place.kept.grow(min(place.room, *size.kept.values()))
    providers = _steps(subject, place.kept)
    return place.bench.case(f"{where}, steps of {subject.pairs} pairs", providers, size.rounds)


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
