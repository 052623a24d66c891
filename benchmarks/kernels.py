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

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.counters import SD15, allocated, host_syncs, launches, peak_bytes
from benchmarks.losses import (
    EMBEDDED,
    LATENTS,
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
from benchmarks.measure import Bench, Machine, Provider, captured, copy_limit, interleaved
from benchmarks.rows import Row
from seppo_fast import shapes
from seppo_fast.config import ModelConfig
from seppo_fast.memory import free_bytes
from seppo_fast.policy import DTYPES, make_trainable

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


_PAIRS = (1, 4, 16, 64, 1024, 8192)
SIZES = {
    "gpu": Size(
        (
            *(Case(pairs, SD) for pairs in _PAIRS),
            *(Case(pairs, SD, ahead=True) for pairs in (1, 16, 1024, 8192)),
            *(Case(pairs, "SDXL 1024 px") for pairs in _PAIRS),
            *(Case(pairs, "video 16 x 256 px") for pairs in (16, 1024)),
            *(Case(pairs, "video 16 x 512 px") for pairs in (1, 16, 1024, 8192)),
        ),
        rounds=15,
        seconds=0.01,
    ),
    "cpu": Size(
        (
            *(Case(pairs, EMBEDDED, True) for pairs in (1, 16, 64)),
            *(Case(pairs, SD, ahead) for ahead in (False, True) for pairs in (1, 4, 16)),
            Case(1, "video 16 x 256 px"),
        ),
        rounds=7,
        seconds=0.05,
    ),
    "quick": Size((Case(1, EMBEDDED), Case(4, SD, True)), rounds=3, seconds=0.01),
}
_TRIED = 5  # runs from which the number of them in a round is taken
_STEP_PAIRS = (1, 4, 16)
_STEP_ROUNDS = 5


def step_seconds(machine: Machine) -> tuple[str, dict[int, float]]:
    """A latent, and seconds that the policy's forward and backward take by number of its pairs; a LoRA is trained."""
    torch.manual_seed(0)
    gpu = machine.device.type == "cuda"
    if gpu:
        with machine.device:
            unet = UNet2DConditionModel(**SD15)
    else:
        unet = UNet2DConditionModel.from_pretrained(shapes.PIPELINE, subfolder="unet")
    make_trainable(unet, ModelConfig(train="lora", precision=machine.precision), 0)
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
    return SD if gpu else EMBEDDED, {pairs: float(np.median(taken)) for pairs, taken in zip(_STEP_PAIRS, seconds)}


def rows(machine: Machine) -> list[Row]:
    """All rows of the suite."""
    bench = Bench(machine, "kernels", copy_limit(machine))
    compiled = compiles(machine)
    latent, steps = step_seconds(machine)
    for case in SIZES[machine.size].cases:
        if lack := missing(case, machine):
            print(f"{case}: left out, {lack}")
            continue
        before = len(bench.rows)
        try:
            _run(bench, case, compiled)
        except torch.OutOfMemoryError:
            print(f"{case}: does not fit into memory after all, and is left out")
            del bench.rows[before:]
        seconds = steps.get(case.pairs) if case.latent == latent else None
        for place, row in enumerate(bench.rows[before:], before):
            if seconds is not None and row.p50_ms is not None:
                bench.rows[place] = replace(row, share_of_step=row.p50_ms / 1e3 / seconds)
    return bench.rows


def missing(case: Case, machine: Machine) -> str | None:
    """What a case lacks of memory, by counted bytes; None where it fits."""
    needed = set_bytes(case) + _TEMPORARY_BYTES[machine.device.type] * case.elements
    free = free_bytes(machine.device)
    return f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free" if needed > free else None


def _run(bench: Bench, case: Case, compiled: bool) -> None:
    """One case: values first, then counts, then time."""
    machine, size = bench.machine, SIZES[bench.machine.size]
    sets = input_sets(case, machine)
    truth = Truth(case, sets[0])
    pool = torch.cuda.graph_pool_handle() if machine.device.type == "cuda" else None
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
    bench.case(str(case), providers, size.rounds)


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
