"""Suite `endtoend`: whole updates, from pictures and prompts to new weights; the naive loop against the trainer.

A unit is a pair. The naive loop processes one pair at a time. A second provider is the same loop with as many pairs at
a time as ours, which it also generates and encodes in batches: the ratio that remains there is due to the library. All
loops train a LoRA on the same examples in the same order, with the same noises and timesteps, and drop no prompt, so
their weights must agree. That is checked first, in float32 with few solver steps, over two updates: the changes of the
weights may differ by 0.1 (relative RMS; AdamW's first steps are nearly the sign of the gradient, so elements whose
gradient is near zero do differ). Ours counts the encoding of every example in full, as in a run that visits each once;
the naive loop encodes each example when it reaches it. Loading the models counts for neither.

`exact` uses the same sampler in both. `fast` (DPM-Solver++ in 20 steps, four draws of (timestep, noise) per sample)
samples from another distribution: its values are checked against the naive loop with those settings, and its time is
compared with the naive loop of the exact mode. On a GPU each mode is first timed without compilation, which takes
minutes by itself, and then compiled, as with the trainer's `memory: fast`. FLOP are those of the UNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import allocated, peak_bytes
from benchmarks.harness.estimates import COMPILED_GRAPH, FORWARD_LAUNCHES, PICTURE, STEP_LAUNCHES, Unet, h200
from benchmarks.harness.loops import Naive, Ours, weight_changes
from benchmarks.harness.measure import Bench, Machine, Provider, Stopwatch, agrees
from benchmarks.harness.models import Workplace, shared_workplace
from benchmarks.harness.naive import NaiveLoop
from benchmarks.harness.rows import (
    GENERATION,
    NAIVE,
    NAIVE_BATCH,
    NAIVE_FAST,
    NAIVE_FAST_BATCH,
    OURS,
    PHASES,
    POLICY,
    REFERENCE,
    SEPARATOR,
    Row,
    with_ratios,
)
from seppo_fast.config.schema import Config

_TOLERANCE = 0.1  # with another flipper the changes of the weights differ by 0.4 to 0.9
_MATMUL_ROUNDS = 5


@dataclass(frozen=True)
class Size:
    """How much is done. None: the trainer chooses.

    Attributes:
        pairs: pairs per update of ours.
        naive_pairs: how many of these the naive loop is timed on, one after another.
        rounds: rounds of timing, with one update each.
        steps: solver steps in the exact mode.
        fast_steps: solver steps in the fast mode.
        uses: draws of (timestep, noise) per sample in the fast mode.
        micro_batch: pairs per forward of ours.
        samples: how many samples ours generates at once.
        recomputed: whether both loops recompute activations.
        compiled: whether ours compiles the repeated blocks.
    """

    pairs: int
    naive_pairs: int
    rounds: int
    steps: int = 50
    fast_steps: int = 20
    uses: int = 4
    micro_batch: int | None = None
    samples: int | None = None
    recomputed: bool | None = None
    compiled: bool | None = None


# Estimated seconds on an H200 (see `estimate`), with set-up in brackets; the second size exceeds six minutes.
SIZES: dict[str, tuple[Size, ...]] = {
    "gpu": (
        Size(pairs=64, naive_pairs=8, rounds=2, compiled=False),  # exact 75 (125), fast 22 (69)
        Size(pairs=64, naive_pairs=8, rounds=2, compiled=True),  # exact 75 (180), fast 22 (148)
    ),
    "cpu": (Size(pairs=32, naive_pairs=16, rounds=3),),
    "quick": (Size(pairs=8, naive_pairs=8, rounds=2, steps=4, fast_steps=2, uses=2, micro_batch=8, samples=8),),
}
CHECKED = Size(pairs=8, naive_pairs=8, rounds=1, steps=4, fast_steps=4, uses=2, micro_batch=3, samples=5)
_BATCH = 32  # pairs that the trainer's `memory: fast` processes at once on an H200
_GRAPHS = 3 * 4  # compiled per mode: policy, reference and sampler, at the UNet's four widths


def estimate(size: Size, fast: bool, unet: Unet = PICTURE) -> float:
    """Returns estimated seconds on an H200 for the rounds of a mode."""
    ours, naive, batch = _update_seconds(size, fast, unet)
    alone = _update_seconds(size, False, unet)[1]
    return size.rounds * (ours + naive + batch + (alone if fast else 0.0))


def estimate_set_up(size: Size, fast: bool, unet: Unet = PICTURE) -> float:
    """Returns estimated seconds on an H200 until the loops of a mode have finished their first update."""
    compiling = _GRAPHS * COMPILED_GRAPH if size.compiled else 0.0
    return unet.trainer + 2 * unet.pipeline + compiling + sum(_update_seconds(size, fast, unet))


def estimate_check(checked: Size, fast: bool, unet: Unet = PICTURE) -> float:
    """Returns estimated seconds on an H200 to compare three loops in float32."""
    pairs = 3 * (checked.rounds + 1) * checked.pairs
    return unet.trainer + 2 * 2 * unet.pipeline + h200(fp32=pairs * _pair(checked, fast, unet))


def _pair(size: Size, fast: bool, unet: Unet) -> float:
    """Returns the TFLOP per pair: its guided sample, or its share of one, the reference and the policy."""
    sample = 2 * unet.forward * (size.fast_steps / size.uses if fast else size.steps)
    return sample + 2 * unet.forward + 2 * unet.trained["lora"]


def _update_seconds(size: Size, fast: bool, unet: Unet) -> tuple[float, float, float]:
    """Returns the estimated seconds of an update: ours, the naive loop's, and the naive loop's in batches."""
    pair, at_once = _pair(size, fast, unet), size.micro_batch or _BATCH
    steps = size.fast_steps / size.uses if fast else size.steps
    launches = steps * FORWARD_LAUNCHES + FORWARD_LAUNCHES + STEP_LAUNCHES["lora"]
    naive = size.naive_pairs * h200(bf16=pair, launches=launches)
    return h200(bf16=size.pairs * pair), naive, h200(bf16=min(size.pairs, at_once) * pair, launches=launches)


def update_config(place: Workplace, size: Size, fast: bool, memory: str, precision: str) -> Config:
    """Returns a configuration for LoRA updates: one per round and one before them. No example occurs twice."""
    updates, uses = size.rounds + 1, size.uses if fast else 1
    solver = {"name": "dpmsolver++", "steps": size.fast_steps} if fast else {"name": "ddim", "steps": size.steps}
    return place.config(
        memory=memory,
        model={"precision": precision, "gradient_checkpointing": size.recomputed, "compile": size.compiled},
        data={"source": place.source(size.pairs // uses * updates)},
        train={"updates": updates, "updates_per_iteration": updates, "pairs_per_update": size.pairs}
        | {"micro_batch": size.micro_batch},
        sampler=solver | {"batch": size.samples},
        reference={"uses": uses, "window": 1},
    )


@dataclass(frozen=True)
class RightLoops:
    """Whether our loop, and the naive loop in batches, change the weights as the naive loop does."""

    ours: bool
    in_batches: bool


@dataclass(frozen=True)
class _Runner:
    """A loop after its first update: whether its values are right, its peak memory, FLOP per pair by phase."""

    loop: Ours | Naive
    value_ok: bool
    peak_bytes: int | None
    flops: dict[str, float]


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases."""
    bench, place = Shared(lambda _: Bench(machine, "endtoend")), shared_workplace(machine)
    right = {fast: shared_right(place, fast) for fast in (False, True)}
    made = [suites.limit_case("matmul", bench)]
    for size in SIZES[machine.size]:
        made += cases_of(bench, place, size, right)
    return made


def shared_right(
    place: Shared[Workplace], fast: bool, checked: Size = CHECKED, unet: Unet = PICTURE
) -> Shared[RightLoops]:
    """Returns the comparison in float32, which cases share."""
    seconds = estimate_check(checked, fast, unet)
    return Shared(lambda _: weights_agree(place(), fast, checked), seconds, (place,))


def cases_of(
    bench: Shared[Bench],
    place: Shared[Workplace],
    size: Size,
    right: Mapping[bool, Shared[RightLoops]],
    unet: Unet = PICTURE,
    prefix: str = "",
) -> list[suites.Case]:
    """Returns the cases of a size.

    Args:
        bench: makes their rows.
        place: the model.
        size: how much is done.
        right: which loops were found right, by mode (whether fast). The fast mode may be missing, and then has no case.
        unet: the UNet whose work the estimates count.
        prefix: beginning of the titles, to tell them from those of other suites.
    """
    loops = {
        fast: Shared(partial(_runners, place, size, fast, agreed), estimate_set_up(size, fast, unet), (place, agreed))
        for fast, agreed in right.items()
    }
    titles = {
        False: f"exact: DDIM {size.steps} steps",
        True: f"fast (another distribution): DPM-Solver++ {size.fast_steps} steps, {size.uses} draws a sample",
    }
    made = []
    for fast in loops:
        title = prefix + titles[fast] + ", compiled" * bool(size.compiled)
        needs: tuple[Shared[Any], ...] = (bench, *(loops[mode] for mode in (False, True)[: 1 + fast]))
        run = partial(_case_rows, bench, loops, fast, title, size.rounds)
        made.append(suites.Case(title, run, estimate(size, fast, unet), needs))
    return made


def _runners(
    shared_place: Shared[Workplace], size: Size, fast: bool, agreed: Shared[RightLoops], stack: ExitStack
) -> dict[str, _Runner]:
    """Returns a mode's loops, each after its first update: ours, the naive one, and the naive one in equal batches."""
    place, right = shared_place(), agreed()
    machine = place.machine
    config = update_config(place, size, fast, "fast", machine.precision)
    before = allocated(machine)
    ours = Ours(config, machine)
    stack.callback(ours.close)
    made = {OURS: _first_update(place, config, ours, right.ours, before)}
    before = allocated(machine)
    loop = NaiveLoop(ours.config, machine)
    batch = ours.config.train.micro_batch
    assert batch is not None, "the trainer chooses it"
    alone = Naive(ours, loop, size.naive_pairs)
    made[NAIVE_FAST if fast else NAIVE] = _first_update(place, config, alone, True, before)
    in_batches = Naive(ours, loop, min(ours.pairs, max(size.naive_pairs, batch)), batch)
    try:
        name = NAIVE_FAST_BATCH if fast else NAIVE_BATCH
        made[name] = _first_update(place, config, in_batches, right.in_batches, before)
    except torch.OutOfMemoryError:
        print(f"{NAIVE_BATCH}: {batch} pairs at once do not fit into memory beside ours; they are left out")
        loop.optimizer.zero_grad(set_to_none=True)  # drops the gradients of the interrupted backward
    return made


def _first_update(place: Workplace, config: Config, loop: Ours | Naive, value_ok: bool, others: int) -> _Runner:
    """Runs a loop's first update, with its one-time work; `others` is the bytes that other loops hold."""
    peak = peak_bytes(place.machine, lambda: loop.update(0), others)
    if peak is None:
        loop.update(0)
    forward = 2 * place.flops()  # per pair
    flops = {
        GENERATION: forward * config.sampler.steps / config.reference.uses,
        REFERENCE: forward,
        POLICY: 2 * place.flops(config.model),
    }
    return _Runner(loop, value_ok, peak, flops)


def _case_rows(
    bench: Shared[Bench], loops: Mapping[bool, Shared[dict[str, _Runner]]], fast: bool, title: str, rounds: int
) -> list[Row]:
    """Returns the rows of a mode, timing its loops in turn; the fast mode also has the exact mode's naive loop."""
    exact = loops[False]()
    names = [NAIVE_FAST, NAIVE_FAST_BATCH, OURS] if fast else [NAIVE_BATCH, OURS]
    own = loops[True]() if fast else exact
    members = {NAIVE: exact[NAIVE]} | {name: own[name] for name in names if name in own}
    watches: dict[str, list[Stopwatch]] = {name: [] for name in members}
    for number in range(1, rounds + 1):
        for name, runner in members.items():
            watches[name].append(runner.loop.update(number))
    bench().measure_limit(_MATMUL_ROUNDS)
    return _report(bench(), title, {name: (runner, watches[name]) for name, runner in members.items()})


def _report(bench: Bench, case: str, members: dict[str, tuple[_Runner, list[Stopwatch]]]) -> list[Row]:
    """Returns the rows of a case: for the whole, then for each phase."""
    rows: list[Row] = []
    for phase in (None, *PHASES):
        made = []
        for name, (runner, watches) in members.items():
            whole = [sum(watch.seconds.values()) for watch in watches]
            taken = whole if phase is None else [watch.seconds[phase] for watch in watches]
            flops = sum(runner.flops.values()) if phase is None else runner.flops.get(phase)
            provider = Provider(
                name,
                partial(runner.loop.update, 0),
                units=runner.loop.pairs,
                flops=None if flops is None else runner.loop.pairs * flops,
                value_ok=runner.value_ok,
                peak_bytes=runner.peak_bytes if phase is None else None,
            )
            row = bench.row(case if phase is None else case + SEPARATOR + phase, provider, NAIVE, taken)
            rate = row.pairs_per_s if phase is None else None
            made.append(replace(row, pairs_per_s=rate, share_of_step=float(np.median(taken) / np.median(whole))))
        rows += with_ratios(made)
    return rows


def weights_agree(place: Workplace, fast: bool, checked: Size = CHECKED) -> RightLoops:
    """Returns which loops change the weights as the naive one does, in two updates in float32 with few solver steps."""
    config = update_config(place, checked, fast, "balanced", "fp32")
    changes = weight_changes(config, place.machine)
    what = f"change of the weights, {'fast' if fast else 'exact'} mode, float32"
    ours, in_batches = (
        agrees(f"{what}, {name}", changes[name], changes[NAIVE], _TOLERANCE) for name in (OURS, NAIVE_BATCH)
    )
    return RightLoops(ours, in_batches)
