"""Suite `step`: one training step on given latents; the Diffusion-DPO script's against ours, over micro-batches.

The baseline holds two UNets and processes one pair at a time, with two forwards each and the loss of the paper's
appendix B.2 (see `naive`). A second provider is the same script with all pairs of a step at once, as in ours: the ratio
that remains there is due to the library. Ours computes the reference's errors `ahead` (timed without and with computing
them), `together` with the policy's forward, or `apart`. For all providers a step of n pairs ends with clipping and
AdamW. A unit is a pair; launches and host syncs are those of a step.

Loss and gradient norm must agree with the baseline's in float32. In float32, on a policy that has moved away from its
reference, they may differ by 1e-3; as the step is timed, on a policy that has not moved, by 1e-3, or by 5e-2 in half
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.harness.estimates import COMPILED_GRAPH, FORWARD_LAUNCHES, PICTURE, STEP_LAUNCHES, Unet, h200
from benchmarks.harness.measure import Bench, Machine, Provider, agrees
from benchmarks.harness.models import Workplace, shared_workplace
from benchmarks.harness.rows import Row
from benchmarks.harness.steps import NAIVE, NAIVE_BATCH, WAYS_TO_STEP, WITH_ERRORS, Naive, Ours, Way, given_pairs
from seppo_fast.config.schema import Config
from seppo_fast.models.trainable import trainable
from seppo_fast.train.trainer import Trainer

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        pairs: numbers of pairs per step, by `model.train`. At the first number, values are compared as they are timed.
            Compiled code is timed only there, since each number of pairs would need a compilation of its own.
        rounds: rounds of timing.
        ways: names of our ways to time.
        checked: pairs on which values are compared in float32: enough to include rejected and learned pairs.
        micro_batch: pairs per forward in that comparison.
        recomputed: whether all providers recompute activations (gradient checkpointing).
    """

    pairs: Mapping[str, tuple[int, ...]]
    rounds: int
    ways: tuple[str, ...] = tuple(WAYS_TO_STEP)
    checked: int = 8
    micro_batch: int = 3
    recomputed: bool = False


# Estimated seconds on an H200 (see `estimate`): for a LoRA 63, 3, 5 and 41, for all weights 46, 20 and 2. Shared set-up
# takes 20 for the pipeline, and 59 for each of the two: to compare in float32, and to create all ways.
SIZES = {
    "gpu": Size({"lora": (16, 1, 4, 32), "full": (4, 16, 1)}, rounds=3),
    "cpu": Size({"lora": (8, 1, 32), "full": (8, 1, 32)}, rounds=7),
    "quick": Size({"lora": (4, 1)}, rounds=3),
}
RightWays = dict[str, bool]
"""Whether each way agrees with the baseline, by name."""
_CALLS = 4  # untimed, per provider and case: memory, launches, syncs, and one more


def estimate(size: Size, train: str, count: int, unet: Unet = PICTURE) -> float:
    """Returns estimated seconds on an H200 for `count` pairs per step."""
    policy, reference, launches = 2 * unet.trained[train], 2 * unet.forward, STEP_LAUNCHES[train]
    pair, host = policy + reference, launches + FORWARD_LAUNCHES  # the script's, and those of most of our ways
    ways = [way for name, way in WAYS_TO_STEP.items() if name in size.ways and train in way.trains]
    first = count == size.pairs[train][0]
    ours = (1 + len(ways) - (0 if first else sum(way.compiled for way in ways))) * h200(
        bf16=count * pair, launches=host
    )
    naive = h200(bf16=count * pair, launches=count * host) + (h200(bf16=count * pair, launches=host) * (count > 1))
    compiled = 4 * COMPILED_GRAPH if first and any(way.compiled for way in ways) else 0.0
    return compiled + (_CALLS + size.rounds) * (ours + naive) * (4 / 3 if size.recomputed else 1.0)


def estimate_set_up(size: Size, train: str, unet: Unet = PICTURE) -> float:
    """Returns estimated seconds on an H200 until all ways are created and compared once, as they are timed."""
    pair = 2 * (unet.trained[train] + unet.forward)
    return unet.trainer + 2 * unet.pipeline + 2 * unet.pipeline + h200(fp32=size.pairs[train][0] * pair)


def estimate_check(size: Size, train: str, unet: Unet = PICTURE) -> float:
    """Returns estimated seconds on an H200 for the comparison in float32."""
    pair = 2 * (unet.trained[train] + unet.forward)
    return unet.trainer + 2 * unet.pipeline + h200(fp32=4 * size.checked * pair)


def step_config(place: Workplace, train: str, pairs: int, micro_batch: int, **model: Any) -> Config:
    """Returns the configuration of a step of `pairs` pairs, with the reference's errors computed ahead."""
    return place.config(
        model={"train": train, "compile": False, "gradient_checkpointing": False, **model},
        data={"source": place.source(pairs)},
        train={"pairs_per_update": pairs, "micro_batch": micro_batch, "updates": 1000, "learning_rate": 1e-6},
        reference={"errors": "ahead"},
        sampler={"batch": 1},
    )


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases."""
    bench = Shared(lambda _: Bench(machine, "step"))
    place, size = shared_workplace(machine), SIZES[machine.size]
    right = {train: shared_right(place, size, train) for train in size.pairs}
    return [suites.limit_case("matmul", bench), *cases_of(bench, place, size, right)]


def shared_right(place: Shared[Workplace], size: Size, train: str, unet: Unet = PICTURE) -> Shared[RightWays]:
    """Returns the comparison in float32, which cases share."""
    return Shared(lambda _: exact_values(place(), size, train), estimate_check(size, train, unet), (place,))


def cases_of(
    bench: Shared[Bench],
    place: Shared[Workplace],
    size: Size,
    right: Mapping[str, Shared[RightWays]],
    unet: Unet = PICTURE,
    prefix: str = "",
) -> list[suites.Case]:
    """Returns the cases of a size.

    Args:
        bench: times them.
        place: the model.
        size: how much is done.
        right: which ways were found right in float32, by `model.train`.
        unet: the UNet whose work the estimates count.
        prefix: beginning of the titles, to tell them from those of other suites.
    """
    made = []
    for train, counts in size.pairs.items():
        contenders = Shared(
            partial(_contenders, place, size, train, right[train]),
            estimate_set_up(size, train, unet),
            (place, right[train]),
        )
        for count in counts:
            recomputing = ", recomputing" * size.recomputed
            title = f"{prefix}{train}, {count} pair{'s' * (count > 1)}{recomputing}"
            run = partial(_case_rows, bench, contenders, title, train, count, size)
            made.append(suites.Case(title, run, estimate(size, train, count, unet), (bench, contenders)))
    return made


@dataclass
class _Contender:
    """A provider before it is timed.

    Attributes:
        step: runs a step on the given number of pairs.
        value_ok: whether its values are right.
        held: bytes of device memory that it holds.
        flops: FLOP per pair.
        at: the only number of pairs at which it is timed; None: all.
    """

    step: Callable[[int], list[Tensor]]
    value_ok: bool
    held: int
    flops: float
    at: int | None = None


def _ways(machine: Machine, size: Size, train: str) -> dict[str, Way]:
    """Returns our ways that support `train`, on this machine, at this size."""
    return {
        name: way
        for name, way in WAYS_TO_STEP.items()
        if name in size.ways and train in way.trains and (machine.device.type == "cuda" or not way.compiled)
    }


def _contenders(
    shared_place: Shared[Workplace], size: Size, train: str, exact: Shared[RightWays], stack: ExitStack
) -> dict[str, _Contender]:
    """Returns all providers for one `train`, compared as they are timed; the baselines come first."""
    place, right, first, most = shared_place(), exact(), size.pairs[train][0], max(size.pairs[train])
    machine = place.machine
    config = step_config(place, train, most, most, gradient_checkpointing=size.recomputed)
    tolerance = _TOLERANCE if machine.precision == "fp32" else _HALF_TOLERANCE
    policy, reference = 2 * place.flops(config.model), 2 * place.flops()  # per pair
    trainer = Trainer(config)
    pairs = given_pairs(trainer)
    in_float32 = config.model_copy(update={"model": config.model.model_copy(update={"precision": "fp32"})})
    expected = Naive(in_float32, machine, pairs, moved=False).step(first)
    before = allocated(machine)
    naive = Naive(config, machine, pairs, moved=False)
    naive.step(1)
    held = allocated(machine) - before
    made = {NAIVE: _Contender(naive.step, True, held, policy + reference)}
    if most > 1:
        made[NAIVE_BATCH] = _Contender(naive.step_at_once, right[NAIVE_BATCH], held, policy + reference)
    frozen = sum(weight.nbytes for weight in trainer.policy.parameters() if not weight.requires_grad)
    for name, way in _ways(machine, size, train).items():
        before = allocated(machine)
        ours = Ours(trainer, way, pairs, False, stack)
        ok = right[name] and _agree(f"{train}, {name}, {machine.precision}", ours.step(first), expected, tolerance)
        held = allocated(machine) - before + (frozen if way.channels_last else 0)  # shared with the trainer
        flops = policy + (0 if way.errors == "ahead" else reference)
        made[name] = _Contender(ours.step, ok, held, flops, first if way.compiled else None)
        if name == "ahead":
            made[WITH_ERRORS] = _Contender(ours.step_with_errors, ok, held, policy + reference)
    return made


def exact_values(place: Workplace, size: Size, train: str) -> RightWays:
    """Returns which ways agree with the baseline in float32, in micro-batches, on a policy that has moved."""
    config = step_config(place, train, size.checked, size.micro_batch, precision="fp32")
    trainer = Trainer(config)
    pairs = given_pairs(trainer)
    naive = Naive(config, place.machine, pairs, moved=True)
    start = {name: weight.detach().clone() for name, weight in trainable(naive.unet).items()}
    expected = naive.step(size.checked)
    with torch.no_grad():
        for name, weight in trainable(naive.unet).items():
            weight.copy_(start[name])
    batches = naive.step(size.checked, size.micro_batch)
    right = {NAIVE_BATCH: _agree(f"{train}, {NAIVE_BATCH}, float32", batches, expected, _TOLERANCE)}
    for name, way in _ways(place.machine, size, train).items():
        if way.compiled or not way.channels_last:  # checked only as they are timed; the arithmetic is that of `ahead`
            right[name] = right["ahead"]
            continue
        with ExitStack() as stack:
            ours = Ours(trainer, way, pairs, True, stack)
            right[name] = _agree(f"{train}, {name}, float32", ours.step(size.checked), expected, _TOLERANCE)
    return right


def _agree(what: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Returns whether loss and gradient norm agree, each compared separately."""
    parts = zip(("loss", "gradient norm"), actual, expected, strict=True)
    return all(agrees(f"{what}, {part}", [ours], [theirs], tolerance) for part, ours, theirs in parts)


def _case_rows(
    bench: Shared[Bench], contenders: Shared[dict[str, _Contender]], title: str, train: str, count: int, size: Size
) -> list[Row]:
    """Returns the rows for one number of pairs: counts first, then measures time."""
    machine, providers = bench().machine, []
    for name, contender in contenders().items():
        if (contender.at not in (None, count)) or (name == NAIVE_BATCH and count == 1):
            continue

        def call(step: Callable[[int], list[Tensor]] = contender.step) -> list[Tensor]:
            return step(count)

        others = allocated(machine) - contender.held
        providers.append(
            Provider(
                name,
                call,
                units=count,
                flops=count * contender.flops,
                value_ok=contender.value_ok,
                peak_bytes=peak_bytes(machine, call, others),
                launches=launches(machine, call),
                host_syncs=host_syncs(machine, call),
            )
        )
        call()
    return bench().case(title, providers, size.rounds)
