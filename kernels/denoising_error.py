"""Triton kernels of denoising errors `m = mean_N (p - y)^2` and their gradient.

p are predictions, y targets, and N is the number of elements per latent:

    dm/dp = c (p - y),   c = 2 / N

Every kernel of the package takes means in the same way, so an error has the same bits whichever kernel computes it. A
latent is divided into chunks of FOLDS x LANES elements. In float32, groups of four neighbours are added, and these sums
are added over the folds of a chunk, first to last. Everything else is added in float64, chunks first to last, and the
mean is rounded once. Products and sums are not contracted to fused multiply-adds (`EXACT`), since the compiler would
choose differently from kernel to kernel. On sm_100 the assembler of triton 3.6 contracts them all the same, identically
in the kernels that were examined.

Shapes are named as in `eager.py`, the PyTorch twin.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Whether kernels are interpreted. Fixed when they are defined below: setting TRITON_INTERPRET later has no effect.
INTERPRETED: bool = triton.knobs.runtime.interpret

EXACT = {"enable_fp_fusion": False}

# The most lanes and folds of a chunk. A warp covers 256 lanes, so that a thread has eight neighbours: 16 bytes of
# bfloat16. The residuals of a pair of chunks fill half of a multiprocessor's registers, in one program of 8 warps with
# 200 registers per thread, or of 16 warps with 128, which gives the scheduler twice as many warps to choose from.
DIVISIONS = {"8 warps": (2048, 8), "16 warps": (4096, 4)}
DEFAULT = "8 warps"
# By compute capability, the division to use where one other than the default has been measured to be faster.
CHOSEN: dict[tuple[int, int] | None, str] = {}

Layout = tuple[int, int, int, int, int]


@triton.jit
def load(ptr, offsets, size):
    """Loads elements of a latent as float32; zeros beyond its end."""
    return tl.load(ptr + offsets, mask=offsets < size, other=0.0).to(tl.float32)


@triton.jit
def load_target(ptr, offsets, size, LAYOUT: tl.constexpr):
    """Loads elements of a target as float32, given their offsets in the prediction's memory; see `layout`."""
    places = offsets
    if LAYOUT is not None:
        outer = offsets // LAYOUT[1]
        places = outer // LAYOUT[0] * LAYOUT[2] + outer % LAYOUT[0] * LAYOUT[3] + offsets % LAYOUT[1] * LAYOUT[4]
    return tl.load(ptr + places, mask=offsets < size, other=0.0).to(tl.float32)


@triton.jit
def by_four(lanes):
    """Adds groups of four neighbours, which one thread holds. This quarters the registers and float64 conversions."""
    QUARTER: tl.constexpr = lanes.shape[0] // 4
    even, odd = tl.split(tl.reshape(lanes, (QUARTER, 2, 2)))
    first, second = tl.split(even + odd)
    return first + second


@triton.jit
def _errors_fwd_kernel(
    pred_ptr, target_ptr, error_ptr,
    size, target_rows, pred_stride, target_stride,
    LAYOUT: tl.constexpr, CHUNKS: tl.constexpr, FOLDS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Computes m of the program's row."""
    row = tl.program_id(0).to(tl.int64)
    pred_ptr += row * pred_stride
    target_ptr += row % target_rows * target_stride
    total = tl.zeros([], tl.float64)
    for chunk in range(CHUNKS):
        quads = tl.zeros([LANES // 4], tl.float32)
        for fold in tl.static_range(FOLDS):
            offsets = (chunk * FOLDS + fold) * LANES + tl.arange(0, LANES)
            residual = load(pred_ptr, offsets, size) - load_target(target_ptr, offsets, size, LAYOUT)
            quads += by_four(residual * residual)
        total += tl.sum(quads.to(tl.float64), 0)
    tl.store(error_ptr + row, (total / size).to(tl.float32))


@triton.jit(do_not_specialize=["target_rows", "coefficient_ptr", "factor_ptr"])
def _errors_bwd_kernel(
    pred_ptr, target_ptr, coefficient_ptr, factor_ptr, grad_ptr,
    size, target_rows, pred_stride, target_stride, grad_stride, factor,
    LAYOUT: tl.constexpr, HALVES: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Writes grad = factor c (p - y) for one block of a target's row, for both halves if they share the target."""
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    offsets = program % BLOCKS * LANES + tl.arange(0, LANES)
    target = load_target(target_ptr + row * target_stride, offsets, size, LAYOUT)
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr)
    for _half in tl.static_range(HALVES):
        pred = load(pred_ptr + row * pred_stride, offsets, size)
        grad = factor * tl.load(coefficient_ptr + row) * (pred - target)
        tl.store(grad_ptr + row * grad_stride + offsets, grad.to(grad_ptr.dtype.element_ty), mask=offsets < size)
        row += target_rows


@cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Returns the compute capability of a GPU; None for a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def division(size: int, device: torch.device) -> dict[str, int]:
    """Returns how a latent of `size` elements is divided on a device: chunks, folds, lanes, and warps per program."""
    return _division(size, *DIVISIONS[CHOSEN.get(capability(device), DEFAULT)])


@cache  # Triton's helpers take 4 us per call, as long as a launch
def _division(size: int, most_lanes: int, most_folds: int) -> dict[str, int]:
    lanes = min(most_lanes, max(16, triton.next_power_of_2(size)))
    chunks = triton.cdiv(size, most_folds * lanes)
    return {
        "CHUNKS": chunks,
        "FOLDS": triton.cdiv(size, chunks * lanes),
        "LANES": lanes,
        "num_warps": max(1, lanes // 256),
    }


def layout(target: Tensor) -> tuple[Tensor, Layout | None]:
    """Describes the memory layout of a target `(S, *dims)`, with dims in the order of the prediction's memory.

    A target that has more than three dims after adjacent dims are merged, or spans more than 2^31 elements, is copied.

    Returns:
        The target, and its layout: None if its latents are contiguous, else the two inner sizes and the three strides
        of a latent of three dims.
    """
    if target.is_contiguous():
        return target, None
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(target.shape[1:], target.stride()[1:], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if len(sizes) > 3 or reach >= 2**31:
        return target.flatten(1), None
    if not sizes or strides == [1]:
        return target, None
    sizes, strides = [1] * (3 - len(sizes)) + sizes, [0] * (3 - len(strides)) + strides
    return target, (sizes[1], sizes[2], strides[0], strides[1], strides[2])


def _errors(pred: Tensor, target: Tensor) -> Tensor:
    rows, size = pred.shape
    assert pred.stride(1) == 1 or size == 1
    parts = division(size, pred.device)
    assert rows % len(target) == 0 and parts["CHUNKS"] * parts["FOLDS"] * parts["LANES"] < 2**31
    target, places = layout(target)
    error = torch.empty(rows, dtype=torch.float32, device=pred.device)
    with torch.cuda.device_of(pred):
        _errors_fwd_kernel[(rows,)](
            pred, target, error,
            size, len(target), pred.stride(0), target.stride(0),
            LAYOUT=places, **parts, **EXACT,
        )  # fmt: skip
    return error


def write_gradient(pred: Tensor, target: Tensor, coefficient: Tensor, factor: float | Tensor, grad: Tensor) -> Tensor:
    """Writes `factor c (p - y)` of each row to `grad` (R, N), which may be `pred` itself; returns `grad`."""
    rows, size = pred.shape
    target, places = layout(target)
    parts = division(size, pred.device)
    lanes, warps = parts["LANES"], parts["num_warps"]
    blocks = -(-size // lanes)
    on_device = isinstance(factor, Tensor)
    with torch.cuda.device_of(pred):
        _errors_bwd_kernel[(len(target) * blocks,)](
            pred, target, coefficient, factor if on_device else None, grad,
            size, len(target), pred.stride(0), target.stride(0), grad.stride(0), 1.0 if on_device else factor,
            LAYOUT=places, HALVES=rows // len(target), BLOCKS=blocks, LANES=lanes, num_warps=warps, **EXACT,
        )  # fmt: skip
    return grad


class _DenoisingErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(pred, target)
        return _errors(pred, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_error: Tensor) -> tuple[Tensor, None]:
        pred, target = ctx.saved_tensors
        return write_gradient(pred, target, grad_error.contiguous(), 2 / pred.shape[1], dense_like(pred)), None


def dense_like(pred: Tensor) -> Tensor:
    """Returns new contiguous memory of a prediction's shape and dtype."""
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def denoising_errors(pred_RN: Tensor, target: Tensor) -> Tensor:
    """Computes `m = mean_N (p - y)^2` of each row: (R,) float32, differentiable in the prediction.

    Args:
        pred_RN: the predictions, at any stride between rows; each row must be contiguous.
        target: the targets: (S, *dims) with S = R or R / 2 and dims in the order of the prediction's memory, at any
            strides.
    """
    return _DenoisingErrors.apply(pred_RN, target)
