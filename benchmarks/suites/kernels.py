"""Suite `kernels`: the loss and its gradient, from predictions in bfloat16 to the gradient that the UNet is given.

The baseline is the loss of the paper's appendix B.2 as it is written there, in float32, on a target in 2B rows as the
Diffusion-DPO script makes it; ours read one target for both halves. A unit is one call for all pairs of a case; the
gradient is asked of autograd for the prediction alone, since in a trainer it goes on into the UNet. Without a GPU
ours is PyTorch code, and nothing of this tells how fast the kernels are.

Checked before anything is timed, against float64 on the same inputs. Of the loss, relative, 1e-5 is allowed with
`ref_pred`, whose differences ours factors, and 1e-4 with `ref_error`, whose own rounding to float32 beta multiplies by
1000 (the exactness that `preference_loss` promises is ten times and twice that); 2e-3 for B.2, which subtracts float32
means. Of the gradient, as a relative RMS, that and 2^-9, a rounding to bfloat16.

What is timed: `p50_ms` from the first of many calls to the moment when the device has done the last, so that at few
pairs it is the host's work, at many the device's; `graph_p50_ms` the same calls replayed from a CUDA graph, the
device's work alone. Inputs are random and take turns over twice the size of the L2 cache. `gb_per_s` is that of the
kernels' byte model (`kernels/preference.py`) over the graph's time, `limit_fraction` its share of a plain copy's in the
same rounds. `share_of_step` is the time of a call over that of the policy's forward and backward on as many pairs of
that latent, with a LoRA, measured once in the same run: less than a step takes, so that the share is rather more than
the true one.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import SD15, allocated, host_syncs, launches, peak_bytes
from benchmarks.harness.estimates import PICTURE, h200
from benchmarks.harness.losses import (
    EMBEDDED,
    LATENTS,
    LAYOUTS,
    OTHER_DIVISIONS,
    SD,
    Case,
    Inputs,
    Truth,
    compiles,
    input_sets,
    is_right,
    set_bytes,
    ways,
)
from benchmarks.harness.measure import Bench, Machine, Provider, captured, copy_limit, interleaved
from benchmarks.harness.rows import Row
from seppo_fast import shapes
from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.trainable import DTYPES, make_trainable
from seppo_fast.models.unet import UNetFamily
from seppo_fast.utils.memory import free_bytes

# Bytes that a call takes at its peak beside its inputs, for each element of the prediction: on a GPU that of B.2, on a
# CPU that of ours, counted on fake tensors; and two for the gradient that a graph keeps.
_TEMPORARY_BYTES = {"cuda": 20 + 2, "cpu": 26}
_GRAPH_SECONDS = 2e-3  # a replay takes at least about this, and starting it a hundredth
_LEAST_SECONDS, _LEAST_SECONDS_EACH = 4e-6, 5 / 4e12  # of a call, and of each element of the prediction


@dataclass(frozen=True)
class Size:
    """Cases, rounds of timing, and about how long a provider is called in a round."""

    cases: tuple[Case, ...]
    rounds: int
    seconds: float


# The trainer's predictions are channels_last; its target is contiguous, or could be made channels_last once.
_TRAINERS = tuple(Case(pairs, SD, True, layout) for pairs in (16, 1024) for layout in LAYOUTS[1:])
# Seconds on an H200 by `estimate`: 11 to 13 each, 23 for the last; 17 for what they share.
SIZES = {
    "gpu": Size(
        (
            *(Case(pairs, SD) for pairs in (1024, 16, 1)),
            *(Case(pairs, SD, True) for pairs in (1024, 16)),
            *_TRAINERS,
            *(Case(pairs, "SDXL 1024 px") for pairs in (1024, 16)),
            *(Case(pairs, SD) for pairs in (8192, 4, 64)),
            *(Case(pairs, "video 16 x 256 px") for pairs in (16, 1024)),
            *(Case(pairs, "video 16 x 512 px") for pairs in (1024, 16)),
            *(Case(pairs, SD, True) for pairs in (8192, 1)),
            *(Case(pairs, "SDXL 1024 px") for pairs in (8192, 1, 4, 64)),
            Case(1, "video 16 x 512 px"),
            Case(8192, "video 16 x 512 px"),
        ),
        rounds=15,
        seconds=0.01,
    ),
    "cpu": Size(
        (
            *(Case(pairs, EMBEDDED, True) for pairs in (1, 16, 64)),
            *(Case(pairs, SD, ahead) for ahead in (False, True) for pairs in (1, 4, 16)),
            *(Case(16, SD, True, layout) for layout in LAYOUTS[1:]),
            Case(1, "video 16 x 256 px"),
        ),
        rounds=7,
        seconds=0.05,
    ),
    "quick": Size((Case(1, EMBEDDED), Case(4, SD, True, LAYOUTS[1])), rounds=3, seconds=0.01),
}
_TRIED = 5  # runs from which the number of them in a round is taken
_STEP_PAIRS = (1, 4, 16)
_STEP_ROUNDS = 5

# Estimated seconds on an H200: until the compiler works, and of `step_seconds`.
_COMPILER_SECONDS = 5.0
_STEP_SECONDS = h200(bf16=(1 + _STEP_ROUNDS) * sum(_STEP_PAIRS) * 2 * PICTURE.trained["lora"], setup=10.0)
_COMPILING_SECONDS = 10.0  # both compiled ways of a case, forward and backward
_MOVED_BYTES = 100  # of an element of the prediction, by a call: at most, B.2 in eager mode
_MADE_BYTES = 1500  # of an element, by making inputs and comparing them with float64


def estimate(case: Case) -> float:
    """Returns seconds on an H200, see `benchmarks.harness.estimates`: in a round a provider is called, and replayed."""
    size = SIZES["gpu"]
    call = max(size.seconds, h200(gb=_MOVED_BYTES * case.elements / 1e9))
    timed = (6 + OTHER_DIVISIONS) * (4 + size.rounds) * (call + _GRAPH_SECONDS)
    return _COMPILING_SECONDS + timed + h200(gb=_MADE_BYTES * case.elements / 1e9)


def step_seconds(machine: Machine) -> dict[int, float]:
    """Seconds that the policy's forward and backward take by number of its pairs; a LoRA is trained.

    On a GPU the latent is SD-1.5's, else that of the embedded pipeline.
    """
    torch.manual_seed(0)
    gpu = machine.device.type == "cuda"
    if gpu:
        with machine.device:
            unet = UNet2DConditionModel(**SD15)
    else:
        unet = UNet2DConditionModel.from_pretrained(shapes.PIPELINE, subfolder="unet")
    make_trainable(unet, ModelConfig(train="lora", precision=machine.precision), 0, UNetFamily)
    unet.to(machine.device, memory_format=torch.channels_last)
    shape, dtype, device = LATENTS[SD if gpu else EMBEDDED], DTYPES[machine.precision], machine.device

    def step(latents: Tensor, timesteps: Tensor, embeds: Tensor, grad: Tensor) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(latents, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]
        prediction.backward(grad)

    calls = []
    for pairs in _STEP_PAIRS:
        latents, grad = (torch.randn(2 * pairs, *shape, device=device) for _ in range(2))
        embeds = torch.randn(2 * pairs, 77, unet.config.cross_attention_dim, device=device)
        timesteps = torch.randint(1000, (2 * pairs,), device=device)
        calls.append(partial(step, latents, timesteps, embeds, grad.to(dtype)))
        calls[-1]()
    seconds = interleaved(machine, calls, _STEP_ROUNDS)
    return {pairs: float(np.median(taken)) for pairs, taken in zip(_STEP_PAIRS, seconds)}


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the suite's cases."""
    bench = Shared(lambda _: Bench(machine, "kernels", copy_limit(machine)))
    compiled = Shared(lambda _: compiles(machine), _COMPILER_SECONDS)
    steps = Shared(lambda _: step_seconds(machine), _STEP_SECONDS)
    latent = SD if machine.device.type == "cuda" else EMBEDDED

    def one(case: Case) -> suites.Case:
        def run() -> list[Row]:
            rows = case_rows(bench(), case, compiled())
            return with_shares(rows, steps()[case.pairs]) if has_share else rows

        has_share = case.latent == latent and case.pairs in _STEP_PAIRS
        needs: tuple[Shared[Any], ...] = (bench, compiled, *[steps] * has_share)
        return suites.Case(str(case), run, estimate(case), needs)

    return [suites.limit_case("copy", bench), *map(one, SIZES[machine.size].cases)]


def with_shares(rows: list[Row], step: float) -> list[Row]:
    """Rows whose `share_of_step` is their time's share of so many seconds of a step."""
    return [replace(row, share_of_step=None if row.p50_ms is None else row.p50_ms / 1e3 / step) for row in rows]


def missing(case: Case, machine: Machine) -> str | None:
    """What a case lacks of memory, by counted bytes, without graphs; None where it fits."""
    return _lack(set_bytes(case) + _TEMPORARY_BYTES[machine.device.type] * case.elements, machine)


def graph_pool(case: Case, machine: Machine) -> Any:
    """The memory pool of a case's graphs; None where it has none: on a CPU, and where they do not fit into memory.

    A graph keeps what its calls take for as long as it lives, and calls without it take as much once more. Where that
    does not fit, a call is nearly all the device's work anyway.
    """
    if machine.device.type != "cuda":
        return None
    if lack := _lack(set_bytes(case) + 2 * _TEMPORARY_BYTES["cuda"] * case.elements, machine):
        print(f"{case}: no CUDA graphs, {lack}")
        return None
    return torch.cuda.graph_pool_handle()


def _lack(needed: int, machine: Machine) -> str | None:
    free = free_bytes(machine.device)
    return f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free" if needed > free else None


def case_rows(bench: Bench, case: Case, compiled: bool) -> list[Row]:
    """Returns the rows of a case: values first, then counts, then time.

    Raises:
        LeftOut: memory is not enough.
    """
    machine, size = bench.machine, SIZES[bench.machine.size]
    if lack := missing(case, machine):
        raise suites.LeftOut(lack)
    pool = graph_pool(case, machine)
    sets = input_sets(case, machine)
    truth = Truth(case, sets[0])
    providers = []
    for name, way in ways(case, machine, compiled).items():
        right = is_right(name, case, way, sets[0], truth)
        once = partial(way.run, sets[0])
        moved = None if way.transfers is None else way.transfers * case.elements  # 2 bytes, and 2B rows for B pairs
        count = max(len(sets), math.ceil(_GRAPH_SECONDS / max(_LEAST_SECONDS, case.elements * _LEAST_SECONDS_EACH)))
        replay = None if pool is None else captured(f"{case}, {name}", way.run, sets, count, pool)
        call, calls = in_turn(machine, way.run, sets, size.seconds)
        providers.append(
            Provider(
                name,
                call,
                units=calls,
                pairs=case.pairs,
                replay=replay,
                replayed=count,
                moved_bytes=moved,
                value_ok=right,
                launches=launches(machine, once),
                host_syncs=host_syncs(machine, once),
                peak_bytes=peak_bytes(machine, once, allocated(machine) - sets[0].nbytes(way.reads)),
            )
        )
    for provider in providers:
        provider.call()  # again, since making graphs gives all unused memory back
    return bench.case(str(case), providers, size.rounds)


def in_turn(
    machine: Machine, run: Callable[[Inputs], object], sets: list[Inputs], seconds: float
) -> tuple[Callable[[], None], int]:
    """A call that runs as often as takes about so many seconds, on one set after another, and how often that is."""
    run(sets[0])
    machine.synchronize()
    started = time.perf_counter()
    for inputs in sets[:_TRIED]:
        run(inputs)
    machine.synchronize()
    each = (time.perf_counter() - started) / len(sets[:_TRIED])
    calls = min(1000, math.ceil(seconds / each))
    turns = itertools.cycle(sets)

    def call() -> None:
        for inputs in itertools.islice(turns, calls):
            run(inputs)

    return call, calls
