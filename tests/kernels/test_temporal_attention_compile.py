"""The machine code of temporal attention, compiled for GPUs that are not present, from arguments of real launches."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from triton.backends.compiler import GPUTarget

import seppo_fast.kernels.temporal_attention as kernels
from tests.kernels.offline import Code, compiled

CAPABILITIES = (80, 90, 100)
WIDTHS = (40, 80, 160)  # head widths in AnimateDiff's motion modules, which have 8 heads
FORWARD, BACKWARD = "forward", "backward"
# The numbers of tensors read and written: the byte model of kernels/temporal_attention.py.
TENSORS = {FORWARD: (3, 1), BACKWARD: (4, 3)}

# Bytes of shared memory per multiprocessor, and those that the system reserves for each program.
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
_RESERVED = 1024


@cache
def _code(capability: int, way: str, width: int, frames: int, dtype: torch.dtype, inside: bool) -> Code:
    """Compiles one launch for 2 clips of 1024 positions; with `inside`, frames are inside positions, (B P, F, H D)."""
    # Memory that is never touched costs nothing.
    memory = [torch.empty(2, *((1024, frames) if inside else (frames, 1024)), 8, width, dtype=dtype) for _ in range(4)]
    q, k, v, grad_out = (x.transpose(1, 2) if inside else x for x in memory)
    call = (lambda: kernels.forward(q, k, v)) if way == FORWARD else (lambda: kernels.backward(q, k, v, grad_out))
    (code,) = compiled(GPUTarget("cuda", capability, 32), call)  # exactly one launch
    return code


def _check(code: Code, capability: int, way: str, width: int, frames: int, dtype: torch.dtype) -> None:
    assert f".target sm_{capability}" in code.ptx
    assert code.usage["STACK"] == code.usage["LOCAL"] == 0
    assert not code.count("LDL") and not code.count("STL")
    assert not code.count("ATOMG") and not code.count("RED")
    # Each element is moved once, 16 bytes at a time. The count includes a chunk's masked lanes beyond the head.
    parts = kernels.division(8, frames, width, dtype)
    _, _, _, items, padded, chunk = parts["SIZES"]
    elements = items * padded * chunk * parts["CHUNKS"]
    each = elements * dtype.itemsize // 16 // (32 * parts["num_warps"])
    reads, writes = TENSORS[way]
    assert dict(code.count("LDG")) == {".E.128": reads * each}
    assert dict(code.count("STG")) == {".E.128": writes * each}
    # No barrier comes between two loads.
    last_load = max(place for place, x in enumerate(code.operations) if x.startswith("LDG"))
    assert not any(x.startswith("BAR") for x in code.operations[:last_load])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("way", TENSORS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_spills_wide_loads_and_each_byte_once(capability, way, width):
    code = _code(capability, way, width, 16, torch.bfloat16, False)
    _check(code, capability, way, width, 16, torch.bfloat16)
    products = code.count("HMMA")
    assert set(products) == {".16816.F32.BF16"}  # tensor cores with sums in float32
    warps, shared = kernels.division(8, 16, width, torch.bfloat16)["num_warps"], code.kernel.metadata.shared
    print(f"sm_{capability} {way} {width}: {code.usage['REG']} registers, {shared} bytes shared, {warps} warps")
    # At least six warps run at a time, whose outstanding loads cover the memory's latency.
    assert code.usage["REG"] <= 128
    assert SHARED[capability] // (shared + _RESERVED) * warps >= 6


@pytest.mark.parametrize("width", [40, 160])
@pytest.mark.parametrize("way", TENSORS)
def test_layout_of_diffusers(way, width):
    """In the layout of diffusers' motion modules, frames are inside positions."""
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
    """At the published settings' 16 frames. With 32 frames of the widest heads triton 3.9.0 uses 144 bytes of stack."""
    code = _code(90, way, width, frames, torch.float32, False)
    _check(code, 90, way, width, frames, torch.float32)
    assert not code.count("HMMA")
    print(f"sm_90 {way} {width}, {frames} frames, float32: {code.usage['REG']} registers")


def test_other_numbers_of_clips_and_positions_need_no_other_kernel():
    """Only the divisibility of strides is compiled in, and a model's frames and heads do not change."""
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
