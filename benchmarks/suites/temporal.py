"""Part of suite `video`: attention over 16 frames at the sizes of AnimateDiff, alone and in its motion modules.

Sizes are those of SD-1.5's four levels at 256 and 512 px, with 8 heads, for 2B clips (B pairs): forward, and forward
with backward. In `attention`, q, k and v are given in each provider's own layout, as after their projections, so
nothing is transposed. In `motion module`, a whole module with frozen weights maps features (2B F, C, H, W),
channels_last, to features, in training precision. That includes what diffusers transposes, and linear layers, which all
providers share.

The baseline is PyTorch's attention as diffusers calls it. `ours, their layout` replaces only the attention processor;
`ours, in place` also leaves the frames where they are in memory. Beyond 65,535 rows the other providers are called in
pieces. Without a GPU, ours is PyTorch code, and the numbers say nothing about the speed of the kernels.

Checked before anything is timed, for the first and the last clip: output and gradients of the inputs against float64,
as a relative RMS. Allowed are 2^-7 for attention in bfloat16 and 1e-5 in float32; for a module four times and ten times
that. `gb_per_s` is the bytes of the kernels' byte model divided by the graph's time; `limit_fraction` is its ratio to a
plain copy's rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_processor import XFormersAttnProcessor
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor

from benchmarks.harness import cases as suites
from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.harness.estimates import h200
from benchmarks.harness.measure import Bench, Machine, Provider, agrees, captured, copy_limit
from benchmarks.harness.rows import Row
from benchmarks.suites.kernels import in_turn
from seppo_fast._loss_arguments import Backend
from seppo_fast.models.attention import GRID_LIMIT, ChunkedAttention
from seppo_fast.models.temporal_attention import FrameAttention, set_temporal_attention, temporal_attention
from seppo_fast.models.trainable import DTYPES

SDPA, XFORMERS = "SDPA", "xformers"
THEIR_LAYOUT, IN_PLACE = "ours, their layout", "ours, in place"
FRAMES, HEADS = 16, 8
WIDTHS = (40, 80, 160, 160)  # width of a head, by level
POSITIONS = {256: (1024, 256, 64, 16), 512: (4096, 1024, 256, 64)}

# Transfers of the kernels, in units of q's bytes: forward, and forward with backward; see their byte model.
_TRANSFERS = (4, 4 + 7)
_TOLERANCE = {
    ("attention", torch.bfloat16): 2**-7,
    ("attention", torch.float32): 1e-5,
    ("motion module", torch.bfloat16): 2**-5,
    ("motion module", torch.float32): 1e-4,
}
_MOST_SETS = 64
_GRAPH_SECONDS = 2e-3  # about the least duration of a replay
_BYTES_A_SECOND = 4e12  # an upper bound for all providers
_MOST_TRANSFERS, _PROVIDERS = 60, 4  # for the estimate; transfers of a motion module with backward, in q's bytes

Run = Callable[["Inputs"], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One computation to compare.

    Attributes:
        what: attention alone, or a motion module.
        pairs: B, the number of pairs; there are 2B clips.
        positions: positions in a frame's features, H W.
        width: width of a head.
        backward: whether gradients are computed too.
    """

    what: Literal["attention", "motion module"]
    pairs: int
    positions: int
    width: int
    backward: bool

    def __str__(self) -> str:
        ways = "forward + backward" if self.backward else "forward"
        sizes = f"{FRAMES} frames x {self.positions} positions, {HEADS} heads of {self.width}"
        return f"{self.what}, {self.pairs} pair{'s' * (self.pairs > 1)}, {sizes}, {ways}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of q, (2B, F, P, H, D)."""
        return 2 * self.pairs, FRAMES, self.positions, HEADS, self.width


@dataclass(frozen=True)
class Inputs:
    """One set of inputs, with the same numbers in each layout; inputs to differentiate require a gradient.

    Attributes:
        outside: for attention q, k, v and a gradient of the output, (2B, F, P, H, D); for a module features and a
            gradient, (2B F, C, H, W) channels_last.
        inside: for attention the same, but with frames inside positions in memory, as motion modules transpose them.
    """

    outside: list[Tensor]
    inside: list[Tensor]


@dataclass(frozen=True)
class Size:
    """Cases, rounds of timing, and about how many seconds a provider is called per round."""

    cases: tuple[Case, ...]
    rounds: int
    seconds: float


def _levels(what: Literal["attention", "motion module"], pairs: tuple[int, ...], pixels: int) -> tuple[Case, ...]:
    levels = list(zip(POSITIONS[pixels], WIDTHS, strict=True))
    return tuple(Case(what, b, p, d, backward) for p, d in levels for b in pairs for backward in (False, True))


# Estimated 1.4 seconds per case on an H200 (see `estimate`). The first cases are forward and backward of four pairs, as
# in a micro-batch, at the larger sizes; the rest exceeds the suite's six minutes.
FIRST = tuple(
    case
    for what in ("attention", "motion module")
    for pixels in POSITIONS
    for case in _levels(what, (4,), pixels)  # type: ignore[arg-type]
    if case.backward and case.positions > 64
)
_ALL = (
    case
    for what in ("attention", "motion module")
    for pixels in POSITIONS
    for case in _levels(what, (1, 2, 4), pixels)  # type: ignore[arg-type]
)
SIZES = {
    "gpu": Size(tuple(dict.fromkeys((*FIRST, *_ALL))), rounds=15, seconds=0.01),
    "cpu": Size(
        (
            *_levels("attention", (1,), 256)[2:],
            *(Case("motion module", 1, 64, 40, backward) for backward in (False, True)),
        ),
        rounds=7,
        seconds=0.05,
    ),
    "quick": Size(
        tuple(Case(what, 1, 16, 40, True) for what in ("attention", "motion module")),  # type: ignore[arg-type]
        rounds=3,
        seconds=0.01,
    ),
}


def cases(machine: Machine) -> list[suites.Case]:
    """Returns the cases; they belong to the suite `video`."""
    bench = Shared(lambda _: Bench(machine, "video", copy_limit(machine)))

    def one(case: Case) -> suites.Case:
        return suites.Case(str(case), lambda: _case_rows(bench(), case), estimate(case), (bench,))

    return [suites.limit_case("copy", bench), *map(one, SIZES[machine.size].cases)]


def estimate(case: Case) -> float:
    """Returns estimated seconds on an H200. Each round calls every provider and replays its graph."""
    size = SIZES["gpu"]
    gb = _MOST_TRANSFERS * math.prod(case.shape) * 2 / 1e9
    return 0.5 + _PROVIDERS * (4 + size.rounds) * (max(size.seconds, h200(gb=gb)) + _GRAPH_SECONDS)


def _case_rows(bench: Bench, case: Case) -> list[Row]:
    """Returns the rows of a case: checks values first, then counts, then measures time."""
    machine, size = bench.machine, SIZES[bench.machine.size]
    sets = _input_sets(case, machine)
    ways, truth = _ways(case, machine)
    pool = torch.cuda.graph_pool_handle() if machine.device.type == "cuda" else None
    q = sets[0].outside[0]
    count = max(len(sets), math.ceil(_GRAPH_SECONDS / (4 * q.nbytes / _BYTES_A_SECOND + 4e-6)))
    providers = []
    for name, (run, transfers) in ways.items():
        once = partial(run, sets[0])
        right = _is_right(f"{case}, {name}", case, once(), sets[0], truth)
        replay = None if pool is None else captured(f"{case}, {name}", run, sets, count, pool)
        call, calls = in_turn(machine, cast(Any, run), cast(Any, sets), size.seconds)
        providers.append(
            Provider(
                name,
                call,
                units=calls,
                pairs=case.pairs,
                replay=replay,
                replayed=count,
                moved_bytes=None if transfers is None else transfers * q.nbytes,
                value_ok=right,
                launches=launches(machine, once),
                host_syncs=host_syncs(machine, once),
                peak_bytes=peak_bytes(machine, once, allocated(machine) - sum(x.nbytes for x in sets[0].outside)),
            )
        )
    for provider in providers:
        provider.call()  # again, since capturing graphs returns all cached memory
    return bench.case(str(case), providers, size.rounds)


def _input_sets(case: Case, machine: Machine) -> list[Inputs]:
    """Returns so many sets that cycling through them covers twice the cache; at most two in quick mode."""
    first = _inputs(case, machine, 0)
    count = math.ceil(2 * machine.cache_bytes / sum(x.nbytes for x in first.outside))
    return [first, *(_inputs(case, machine, seed) for seed in range(1, min(2 if machine.quick else _MOST_SETS, count)))]


def _inputs(case: Case, machine: Machine, seed: int) -> Inputs:
    generator = torch.Generator(machine.device).manual_seed(seed)
    normal = partial(torch.randn, generator=generator, device=machine.device)
    dtype = DTYPES[machine.precision]
    if case.what == "motion module":
        clips, _, positions, _, _ = case.shape
        side = math.isqrt(positions)
        shape = clips * FRAMES, HEADS * case.width, side, side
        features, grad = (normal(shape).to(dtype, memory_format=torch.channels_last) for _ in range(2))
        return Inputs([features.requires_grad_(case.backward), grad], [])
    outside = [normal(case.shape).to(dtype) for _ in range(4)]
    inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in outside]
    for x in (*outside[:3], *inside[:3]):
        x.requires_grad_(case.backward)
    return Inputs(outside, inside)


def _ways(case: Case, machine: Machine) -> tuple[dict[str, tuple[Run, int | None]], Run]:
    """Returns by name each way to run a case, with its transfers by the byte model; and one for float64, the truth."""
    backend: Backend = "triton" if machine.device.type == "cuda" else "torch"
    has_xformers = attention_processor.xformers is not None and machine.device.type == "cuda"
    if case.what == "motion module":
        modules = _modules(case, machine, backend, has_xformers)
        truth = copy.deepcopy(modules[SDPA]).double()
        return {
            name: (partial(_through_module, module, case.backward), None) for name, module in modules.items()
        }, partial(_through_module, truth, case.backward)
    transfers = _TRANSFERS[case.backward] if backend == "triton" else None
    ours = partial(temporal_attention, backend=backend)
    ways: dict[str, tuple[Run, int | None]] = {SDPA: (partial(_attention, _sdpa, "inside", case.backward), None)}
    if has_xformers:
        ways[XFORMERS] = partial(_attention, _xformers, "inside", case.backward), None
    ways[THEIR_LAYOUT] = partial(_attention, ours, "inside", case.backward), transfers
    ways[IN_PLACE] = partial(_attention, ours, "outside", case.backward), transfers
    return ways, partial(_attention, _formula, "outside", case.backward)


def _modules(case: Case, machine: Machine, backend: Backend, has_xformers: bool) -> dict[str, AnimateDiffTransformer3D]:
    """Returns a frozen motion module per provider, all with the same random weights."""
    torch.manual_seed(0)
    with machine.device:
        module = AnimateDiffTransformer3D(
            num_attention_heads=HEADS,
            attention_head_dim=case.width,
            in_channels=HEADS * case.width,
            positional_embeddings="sinusoidal",
            num_positional_embeddings=32,
        )
    module.eval().requires_grad_(False).to(DTYPES[machine.precision])
    modules = {SDPA: module} | {name: copy.deepcopy(module) for name in (THEIR_LAYOUT, IN_PLACE)}
    set_temporal_attention(modules[SDPA], "sdpa")
    set_temporal_attention(modules[IN_PLACE], "triton" if backend == "triton" else "torch")
    _set_processors(modules[THEIR_LAYOUT], FrameAttention(backend))
    if has_xformers:
        modules[XFORMERS] = copy.deepcopy(module)
        _set_processors(modules[XFORMERS], ChunkedAttention(XFormersAttnProcessor()))
    return modules


def _set_processors(module: AnimateDiffTransformer3D, processor: Callable[..., Tensor]) -> None:
    for block in module.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            attn.set_processor(processor)


def _through_module(module: AnimateDiffTransformer3D, backward: bool, inputs: Inputs) -> list[Tensor]:
    """Returns the output features, and with `backward` the gradient of the input features, (2B F, C, H, W)."""
    features, grad = inputs.outside
    with torch.autocast(features.device.type, features.dtype, enabled=features.dtype == torch.bfloat16):
        out = module(features, num_frames=FRAMES)
    return [out, *(torch.autograd.grad(out, features, grad) if backward else ())]


def _attention(call: Callable[..., Tensor], layout: str, backward: bool, inputs: Inputs) -> list[Tensor]:
    """Returns the output, and with `backward` the gradients of q, k, v, each (2B, F, P, H, D)."""
    q, k, v, grad = getattr(inputs, layout)
    out = call(q, k, v)
    return [out, *(torch.autograd.grad(out, (q, k, v), grad) if backward else ())]


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bfphd,bgphd->bphfg", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bphfg,bgphd->bfphd", scores.softmax(-1), v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    return _by_rows(call, q, k, v)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return _by_rows(memory_efficient_attention, q, k, v)


def _by_rows(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Applies `call` to rows (2B P, F, H, D), views if frames are inside positions, as many at once as it accepts."""
    rows = [x.transpose(1, 2).flatten(0, 1) for x in tensors]
    parts = [x.split((GRID_LIMIT - 1) // HEADS) for x in rows]
    made = [call(*part) for part in zip(*parts, strict=True)]
    out = made[0] if len(made) == 1 else torch.cat(made)
    return out.unflatten(0, (len(tensors[0]), -1)).transpose(1, 2)


def _is_right(what: str, case: Case, results: list[Tensor], inputs: Inputs, truth: Run) -> bool:
    """Returns whether output and gradients of the first and last clip are within the tolerances documented above."""
    tolerance = _TOLERANCE[case.what, inputs.outside[0].dtype]
    of_a_clip = FRAMES if case.what == "motion module" else 1
    right = True
    for rows in (slice(0, of_a_clip), slice(-of_a_clip, None)):
        alone = [x[rows].detach().double().requires_grad_(case.backward) for x in inputs.outside]
        expected = truth(Inputs(alone, []))
        ours = [x[rows] for x in results]
        right &= all(agrees(what, [mine], [exact], tolerance) for mine, exact in zip(ours, expected, strict=True))
    return right
