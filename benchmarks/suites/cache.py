"""Suite `cache`: switches of a reference to another past policy, from device memory, host memory or mapped files.

`switch` is `ReferencePool.load_into` for a bound module; `switch, in place` enters and leaves `ReferencePool.resident`,
as the trainer does. The baseline is `load_state_dict` from host memory, in float32 and with the module's own strides;
`from a file` first reads a file with safetensors. `plain copy` moves as many bytes as a switch: on a GPU from pinned
host memory, or within GPU memory if the checkpoints are there. Its rate in the same rounds is the limit. GB/s count a
checkpoint's bytes once. All providers cycle through random checkpoints; files are in the page cache, and those of a
LoRA in a GPU's cache.

Checked bit for bit before anything is timed: the tensors, rounded to the dtypes in which they are kept, and the
predictions, against those of the policy with the same weights in float32.

`share_of_step` is the time of a switch relative to the learner's forward and backward, measured in the same run, on
all pairs between two draws: 2048 per update on one GPU, and those of 30 updates if a reference is drawn per iteration.
The reference's samples and errors take additional time, so the share of a whole run is smaller.

The last case of a tier times training steps: alone (`no switch`), with a switch after each, and with the next
checkpoint also prefetched during each. The time beyond `no switch` is the visible cost of drawing that often.
`launches` counts copies too.

Without a GPU all copies stay within host memory, and only the ratios are meaningful.
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
_ROOM = 0.8  # share of the free space that a tier's checkpoints may use
_CALL_BYTES = 2**26  # copied per timed call, unless all checkpoints have fewer


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        models: values of `model.train` and `model.precision`.
        kept: number of checkpoints, by `reference.redraw`.
        rounds: rounds of timing.
        pairs: pairs per training step.
        steps: steps per call; fewer than checkpoints, so that no switch finds one that an earlier switch has loaded.
    """

    models: tuple[tuple[str, str], ...]
    kept: Mapping[str, int]
    rounds: int
    pairs: int
    steps: int


_KEPT = {"iteration": 7, "update": 20}
_CPU_MODELS = (("full", "fp32"), ("full", "bf16"), ("lora", "fp32"))
# Estimated seconds on an H200 (see `estimate`): for all weights 19 to 51 per case and 45 for their shared set-up, for a
# LoRA 5 to 16 and 10.
SIZES = {
    "gpu": Size((("full", "bf16"), ("lora", "bf16")), _KEPT, rounds=5, pairs=16, steps=4),
    "cpu": Size(_CPU_MODELS, _KEPT, rounds=15, pairs=4, steps=4),
    "quick": Size(_CPU_MODELS, _KEPT, rounds=3, pairs=1, steps=2),
}

# Assumed seconds on an H200 and its host: to add a checkpoint of all weights to each tier; for a round of both
# baselines, one of which reads a file; and for one-time set-up. A LoRA has 3 MB, so only the host's work counts.
_ADDED: dict[Tier, float] = {"device": 0.2, "host": 1.0, "disk": 2.5}
_BASELINES, _LORA_BASELINES = 3.0, 0.2
_SUBJECT, _STATES = 5.0, 40.0


def estimate(train: str, tier: Tier, added: int) -> float:
    """Returns estimated seconds on an H200 for a case that adds `added` checkpoints."""
    full, rounds = train == "full", SIZES["gpu"].rounds
    return 3.0 + rounds * (_BASELINES if full else _LORA_BASELINES) + added * (_ADDED[tier] if full else 0.1)


def estimate_steps(train: str) -> float:
    """Returns estimated seconds on an H200 for the case of training steps."""
    size = SIZES["gpu"]
    step = h200(bf16=2 * size.pairs * PICTURE.trained[train], launches=STEP_LAUNCHES[train])
    return 3 * (1 + size.rounds) * size.steps * step


@dataclass(frozen=True)
class _Compared:
    """What the cases of one kind of checkpoint share: the subject, the seconds of its step, baselines, a folder."""

    subject: Subject
    step_seconds: float
    loads: list[Provider]
    folder: Path


@dataclass(frozen=True)
class _InTier:
    """What the cases of one tier share.

    Attributes:
        bench: the bench, with `plain` as its limit.
        kept: the checkpoints.
        room: how many checkpoints fit.
        plain: copies as many bytes as `calls` switches.
        calls: switches per timed call.
    """

    bench: Bench
    kept: Kept
    room: int
    plain: Callable[[], None]
    calls: int


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases: host memory first, since that is where past policies end up."""
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
            if tier == "disk" or (tier == "host" and gpu):  # elsewhere there is nothing to prefetch
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
    """Creates the tier's empty pool, and the plain copy to compare with.

    Raises:
        LeftOut: there is room for too few checkpoints.
    """
    subject, folder = compared().subject, compared().folder
    size, room = SIZES[subject.machine.size], room_for(subject, tier, folder)
    if room <= size.steps:
        raise suites.LeftOut(f"there is room for {room} checkpoints; at least {size.steps + 1} are needed")
    calls = min(room, *size.kept.values(), math.ceil(_CALL_BYTES / subject.table.size))
    plain = repeated(plain_copy(subject, tier), calls)
    bench = Bench(subject.machine, "cache", Limit("copy", where, plain, calls * subject.table.size))
    kept = Kept(subject, tier, room, folder)
    stack.enter_context(kept.pool)
    return _InTier(bench, kept, room, plain, calls)


def _switch_rows(
    compared: Shared[_Compared], in_tier: Shared[_InTier], tier: Tier, where: str, redraw: str
) -> list[Row]:
    """Returns the rows of switches among as many checkpoints as `redraw` keeps."""
    subject, place = compared().subject, in_tier()
    size = SIZES[subject.machine.size]
    count = min(size.kept[redraw], place.room)
    if count < size.kept[redraw]:
        print(f"{where}: {count} checkpoints instead of {size.kept[redraw]}; there is no room for more")
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
    """Returns the rows of training steps with a switch after each, among the checkpoints that exist or the fewest."""
    subject, place = compared().subject, in_tier()
    size = SIZES[subject.machine.size]
    place.kept.grow(min(place.room, *size.kept.values()))
    providers = _steps(subject, place.kept)
    return place.bench.case(f"{where}, steps of {subject.pairs} pairs", providers, size.rounds)


def with_shares(rows: list[Row], learning: float) -> list[Row]:
    """Returns the rows with `share_of_step` set to their time relative to `learning` seconds."""
    return [replace(row, share_of_step=None if row.p50_ms is None else row.p50_ms / 1e3 / learning) for row in rows]


def _in_words(subject: Subject, kept: Kept, switch: Row) -> str:
    """Returns a line on what the table does not show."""
    payload = len(kept.pool) * subject.table.payload
    return (
        f"{payload / 1e6:.4g} MB of tensors; host memory grew by {kept.host_bytes / payload:.4f} times that; "
        f"a switch takes {switch.share_of_step:.2g} of the learning's time"
    )


def room_for(subject: Subject, tier: Tier, folder: Path) -> int:
    """Returns how many checkpoints fit into a tier here, at most as many as the suite needs."""
    if tier == "disk":
        free = shutil.disk_usage(folder).free
    else:
        free = free_bytes(subject.machine.device if tier == "device" else torch.device("cpu"))
    return min(max(SIZES[subject.machine.size].kept.values()), int(_ROOM * free) // subject.table.size)


def pairs_between(redraw: str) -> int:
    """Returns the pairs that the learner processes between two draws in the paper's setting, on one device."""
    paper = TrainConfig()
    return paper.pairs_per_update * (paper.updates_per_iteration if redraw == "iteration" else 1)


def plain_copy(subject: Subject, tier: Tier) -> Callable[[], object]:
    """Returns a call that copies random bytes, as many as a checkpoint has, to the device, cycling through sources."""
    size, device = subject.table.size, subject.machine.device
    sources = [torch.randint(256, (size,), dtype=torch.uint8, device=device) for _ in range(_turns(subject, size))]
    if device.type == "cuda" and tier != "device":
        sources = [torch.empty(size, dtype=torch.uint8, pin_memory=True).copy_(source) for source in sources]
    copied, turns = torch.empty(size, dtype=torch.uint8, device=device), itertools.cycle(sources)
    return lambda: copied.copy_(next(turns), non_blocking=True)


def repeated(once: Callable[[], object], calls: int) -> Callable[[], None]:
    """Returns a call that makes `calls` calls of `once`."""

    def call() -> None:
        for _ in range(calls):
            once()

    return call


def _turns(subject: Subject, nbytes: int) -> int:
    """Returns how many sources of `nbytes` to cycle through: enough to exceed the cache, at most one per checkpoint."""
    most = max(SIZES[subject.machine.size].kept.values())
    return min(most, max(2, math.ceil(2 * subject.machine.cache_bytes / nbytes)))


def _baselines(subject: Subject, folder: Path) -> list[Provider]:
    """Returns the usual ways to load, for all tiers; counted only once, since that takes seconds at true size."""
    states = StateDicts(subject, _turns(subject, subject.nbytes), folder)
    ways = {LOAD: states.load, READ: states.read}
    nbytes = subject.nbytes
    return [_provider(subject, way, once, 1, nbytes, nbytes, states.right[way]) for way, once in ways.items()]


def _switches(subject: Subject, kept: Kept, tier: Tier, calls: int) -> list[Provider]:
    """Returns both kinds of switch, with `calls` switches per call."""
    size, right = subject.table.size, kept.are_right()
    held = size + (len(kept.pool) * size if tier == "device" else 0)
    ways = {SWITCH: kept.switch, IN_PLACE: kept.switch_in_place}
    return [_provider(subject, way, once, calls, size, held, right[way]) for way, once in ways.items()]


def _provider(
    subject: Subject, way: str, once: Callable[[], object], calls: int, moved: int, held: int, right: bool
) -> Provider:
    """Returns a provider for a way to switch, with its launches, synchronizations and memory counted.

    Args:
        subject: what is switched.
        way: the provider's name.
        once: makes one switch.
        calls: switches per timed call.
        moved: bytes that a switch copies.
        held: bytes of device memory that it occupies permanently.
        right: whether its values are right.
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
    """Returns the number of copies to, from or within a GPU's memory, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.name.startswith("Memcpy") for event in profiler.events())


def _steps(subject: Subject, kept: Kept) -> list[Provider]:
    """Returns training steps: alone, with a switch after each, and with the next checkpoint also prefetched."""

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
