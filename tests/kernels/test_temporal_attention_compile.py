"""The machine code of temporal attention, compiled for GPUs that are not here from the arguments of real launches."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from triton.backends.compiler import GPUTarget

import seppo_fast.kernels.temporal_attention as kernels
from tests.kernels.offline import Code, compiled

CAPABILITIES = (80, 90, 100)
WIDTHS = (40, 80, 160)  # of a head in AnimateDiff's motion modules, which have 8
FORWARD, BACKWARD = "forward", "backward"
TENSORS = {FORWARD: (3, 1), BACKWARD: (4, 3)}  # read and written: the byte model of kernels/temporal_attention.py

# Bytes of shared memory that the programs of a multiprocessor share, and what each needs beside its own.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED = 1024


@cache
def _code(capability: int, way: str, width: int, frames: int, dtype: torch.dtype, inside: bool) -> Code:
    """One launch for 2 clips of 1024 positions; `inside`: frames within positions, (B P, F, H D)."""
    # Memory that nobody touches costs nothing.
    memory = [torch.empty(2, *((1024, frames) if inside else (frames, 1024)), 8, width, dtype=dtype) for _ in range(4)]
    q, k, v, grad_out = (x.transpose(1, 2) if inside else x for x in memory)
    call = (lambda: kernels.forward(q, k, v)) if way == FORWARD else (lambda: kernels.backward(q, k, v, grad_out))
    (code,) = compiled(GPUTarget("cuda", capability, 32), call)  # one launch
    return code


def _check(code: Code, capability: int, way: str, width: int, frames: int, dtype: torch.dtype) -> None:
    assert f".target sm_{capability}" in code.ptx
    assert code.usage["STACK"] == code.usage["LOCAL"] == 0
    assert not code.count("LDL") and not code.count("STL")
    assert not code.count("ATOMG") and not code.count("RED")
    # Each element once and 16 bytes at a time: as many as there are, a chunk's lanes behind the head included.
    parts = kernels.division(8, frames, width, dtype)
    _, _, _, items, padded, chunk = parts["SIZES"]
    elements = items * padded * chunk * parts["CHUNKS"]
    each = elements * dtype.itemsize // 16 // (32 * parts["num_warps"])
    reads, writes = TENSORS[way]
    assert dict(code.count("LDG")) == {".E.128": reads * each}
    assert dict(code.count("STG")) == {".E.128": writes * each}
    # Nothing waits for the whole program between two loads.
    last_load = max(place for place, x in enumerate(code.operations) if x.startswith("LDG"))
    assert not any(x.startswith("BAR") for x in code.operations[:last_load])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills_wide_loads_and_each_byte_once(capability, way, width):
    code = _code(capability, way, width, 16, torch.bfloat16, False)
    _check(code, capability, way, width, 16, torch.bfloat16)
    products = code.count("HMMA")
    assert set(products) == {".16816.F32.BF16"}  # tensor cores, sums in float32
    warps, shared = kernels.division(8, 16, width, torch.bfloat16)["num_warps"], code.kernel.metadata.shared
    print(f"sm_{capability} {way} {width}: {code.usage['REG']} registers, {shared} bytes shared, {warps} warps")
    # Six warps at a time or more: what they have begun to load covers the memory's latency.
    assert code.usage["REG"] <= 128
    assert SHARED[capability] // (shared + _RESERVED) * warps >= 6


@pytest.mark.parametrize("width", [40, 160])
@pytest.mark.parametrize("way", TENSORS)
def test_layout_of_diffusers(way, width):
    """Frames inside of positions."""
    _check(_code(90, way, width, 16, torch.bfloat16, True), 90, way, width, 16, torch.bfloat16)


def test_float16():
    code = _code(90, BACKWARD, 80, 16, torch.float16, False)
    _check(code, 90, BACKWARD, 80, 16, torch.float16)
    assert set(code.count("HMMA")) == {".16816.F32"}


def test_thirty_two_frames():
    _check(_code(80, BACKWARD, 160, 32, torch.bfloat16, False), 80, BACKWARD, 160, 32, torch.bfloat16)


@pytest.mark.parametrize(
    ("way", "frames", "width"),
    [(FORWARD, 16, 160), (BACKWARD, 16, 40), (BACKWARD, 16, 80), (BACKWARD, 16, 160)],
)
def test_float32_has_no_spills_and_no_tf32(way, frames, width):
    """At the frames of the published settings: with 32 frames of the widest heads triton 3.9.0 takes 144 bytes."""
    code = _code(90, way, width, frames, torch.float32, False)
    _check(code, 90, way, width, frames, torch.float32)
    assert not code.count("HMMA")
    print(f"sm_90 {way} {width}, {frames} frames, float32: {code.usage['REG']} registers")


def test_other_numbers_of_clips_and_positions_need_no_other_kernel():
    """Strides are compiled for their divisibility alone, and the frames and heads of a model stay what they are."""
    cubins = set()
    for clips, positions in ((1, 64), (8, 4096)):
        q, k, v = torch.empty(3, clips, 16, positions, 8, 40, dtype=torch.bfloat16).unbind()
        (code,) = compiled(GPUTarget("cuda", 90, 32), lambda q=q, k=k, v=v: kernels.forward(q, k, v))
        cubins.add(code.kernel.asm["cubin"])
    assert len(cubins) == 1


def test_another_stride_of_heads_is_another_kernel():
    q = torch.empty(1, 16, 64, 8, 40, dtype=torch.bfloat16)
    wide = torch.empty(1, 16, 64, 8, 80, dtype=torch.bfloat16)[..., :40]
    made = [compiled(GPUTarget("cuda", 90, 32), lambda k=k: kernels.forward(q, k, q))[0] for k in (q, wide)]
    assert len({code.kernel.asm["cubin"] for code in made}) == 2
