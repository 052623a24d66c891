"""Suite `kernels`: the loss and its gradient, from predictions in bfloat16 to the gradient that the UNet receives.

The baseline is the loss of the paper's appendix B.2 as written there, in float32, on a target that is repeated to 2B
rows as in the Diffusion-DPO script; ours read one target for both halves. A unit is one call for all pairs of a case.
The gradient is computed with respect to the prediction only, since in a trainer backpropagation continues from there
through the UNet. Without a GPU, ours is PyTorch code, and the numbers say nothing about the speed of the kernels.

Values are checked against float64 on the same inputs before anything is timed. Allowed relative errors of the loss are
1e-5 with `ref_pred`, where ours factors the differences, and 1e-4 with `ref_error`, whose own rounding to float32 is
multiplied by beta/2 = 1000 (ten times and twice the errors that `preference_loss` promises), and 2e-3 for B.2, which
subtracts float32 means. The relative RMS error of the gradient may be larger by 2^-9, its rounding to bfloat16.

`p50_ms` is measured from the first of many calls until the device has finished the last, so it shows the host's work
at few pairs and the device's at many. `graph_p50_ms` is for the same calls replayed from a CUDA graph: the device's
work alone. Inputs are random, and calls cycle through sets of twice the size of the L2 cache. `gb_per_s` is the bytes
of the kernels' byte model (`kernels/preference.py`) divided by the graph's time; `limit_fraction` is its ratio to a
plain copy's rate in the same rounds. `share_of_step` is the time of a call relative to the policy's forward and
backward on as many pairs of that latent, with a LoRA, measured once in the same run. A full step takes longer than
that, so the true share is somewhat smaller.
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

# Peak bytes of a call besides its inputs, per element of the prediction, counted on fake tensors: on a GPU those of
# B.2, plus two for the gradient that a graph keeps; on a CPU those of ours.
_TEMPORARY_BYTES = {"cuda": 20 + 2, "cpu": 26}
_GRAPH_SECONDS = 2e-3  # about the least duration of a replay; starting one takes a hundredth of it
_LEAST_SECONDS, _LEAST_SECONDS_EACH = 4e-6, 5 / 4e12  # lower bounds, per call and per element of the prediction


@dataclass(frozen=True)
class Size:
    """Cases, rounds of timing, and about how many seconds a provider is called per round."""

    cases: tuple[Case, ...]
    rounds: int
    seconds: float


# The trainer's predictions are channels_last; its target is contiguous, but could be converted once.
_TRAINERS = tuple(Case(pairs, SD, True, layout) for pairs in (16, 1024) for layout in LAYOUTS[1:])
# Estimated seconds on an H200 (see `estimate`): 11 to 13 per case, 23 for the last, 17 for their shared set-up.
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
_TRIED = 5  # trial runs, which determine how many runs a round has
_STEP_PAIRS = (1, 4, 16)
_STEP_ROUNDS = 5

# Estimated seconds on an H200, for checking that the compiler works, and for `step_seconds`.
_COMPILER_SECONDS = 5.0
_STEP_SECONDS = h200(bf16=(1 + _STEP_ROUNDS) * sum(_STEP_PAIRS) * 2 * PICTURE.trained["lora"], setup=10.0)
_COMPILING_SECONDS = 10.0  # for both compiled ways of a case, forward and backward
_MOVED_BYTES = 100  # per element of the prediction and call, at most: those of B.2 in eager mode
_MADE_BYTES = 1500  # per element, for making inputs and comparing results with float64


def estimate(case: Case) -> float:
    """Returns estimated seconds on an H200. Each round calls every provider and replays its graph."""
    size = SIZES["gpu"]
    call = max(size.seconds, h200(gb=_MOVED_BYTES * case.elements / 1e9))
    timed = (6 + OTHER_DIVISIONS) * (4 + size.rounds) * (call + _GRAPH_SECONDS)
    return _COMPILING_SECONDS + timed + h200(gb=_MADE_BYTES * case.elements / 1e9)


def step_seconds(machine: Machine) -> dict[int, float]:
    """Returns the seconds of the policy's forward and backward, with a LoRA, by number of pairs.

    The latent is SD-1.5's on a GPU, else the embedded pipeline's.
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
    """Returns the rows with `share_of_step` set to their time relative to a step of `step` seconds."""
    return [replace(row, share_of_step=None if row.p50_ms is None else row.p50_ms / 1e3 / step) for row in rows]


def missing(case: Case, machine: Machine) -> str | None:
    """Returns how much memory a case needs and has, if it does not fit without graphs; None if it fits."""
    return _lack(set_bytes(case) + _TEMPORARY_BYTES[machine.device.type] * case.elements, machine)


def graph_pool(case: Case, machine: Machine) -> Any:
    """Returns a memory pool for a case's graphs; None for no graphs: on a CPU, or if they do not fit into memory.

    A graph keeps the memory of its calls for as long as it lives, and calls outside the graph need as much again. When
    that does not fit, nearly all of a call's time is the device's anyway.
    """
    if machine.device.type != "cuda":
        return None
    if lack := _lack(set_bytes(case) + 2 * _TEMPORARY_BYTES["cuda"] * case.elements, machine):
        print(f"{case}: no CUDA graphs: {lack}")
        return None
    return torch.cuda.graph_pool_handle()


def _lack(needed: int, machine: Machine) -> str | None:
    free = free_bytes(machine.device)
    return f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free" if needed > free else None


def case_rows(bench: Bench, case: Case, compiled: bool) -> list[Row]:
    """Returns the rows of a case: checks values first, then counts, then measures time.

    Raises:
        LeftOut: there is not enough memory.
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
        moved = None if way.transfers is None else way.transfers * case.elements  # 2 bytes each, in 2B rows
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
        provider.call()  # again, since capturing graphs returns all cached memory
    return bench.case(str(case), providers, size.rounds)


def in_turn(
    machine: Machine, run: Callable[[Inputs], object], sets: list[Inputs], seconds: float
) -> tuple[Callable[[], None], int]:
    """Returns a call that runs for about `seconds`, cycling through the sets, and how many runs it makes."""
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
