"""Attention of each position of a clip over its frames, `softmax(q k^T / sqrt(D)) v`, and its gradient.

    S = q k^T / sqrt(D)    P = softmax(S)    o = P v
    dv = P^T do    dP = do v^T    dS = P (dP - rowsum(P dP)) / sqrt(D)    dq = dS k    dk = dS^T q

A clip has at most 32 frames, so the scores of a position and a head are one small tile, which in half precision a warp
has to itself; no barrier stands between its loads, so that they wait for memory together. Items are counted along one
side of the grid, so there may be nearly 2^31 of them, and q, k, v are read where they lie, by strides: frames may stand
outside of the positions, as in the features of a UNet, or inside, as motion modules transpose them.

Bytes moved, in units of B F P H D times the element size, one launch each; no number of a row is kept in between:

    forward    q k v     ->  o           4
    backward   q k v do  ->  dq dk dv    7

The backward takes the softmax anew from q and k, which it reads anyway: kept log-sums would add bytes and save nothing,
as S has to be made all the same; rowsum(P dP) stands in for rowsum(do o), so o is not read either.

Operands of the products are in the inputs' dtype, sums and the softmax in float32; P and dS are rounded to that dtype
as in other fused attention. float32 is not taken to TF32. Under the interpreter, whose arithmetic on bfloat16 is wrong,
operands are float32 whatever the inputs are.

Shapes: B clips, F frames, P positions, H heads, D width of a head; an item is a head of a position of a clip.
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

from seppo_fast.kernels.denoising_error import INTERPRETED

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(tensor, items, positions, SIZES: tl.constexpr, TURNED: tl.constexpr):
    """A program's items in a tensor: pointers to the first neighbours of each head, which items and frames there are.

    (ITEMS, PADDED, CHUNK), or turned (ITEMS, CHUNK, PADDED); and the neighbours' numbers.
    """
    ptr, strides, HEAD_STRIDE = tensor
    HEADS: tl.constexpr = SIZES[0]
    FRAMES: tl.constexpr = SIZES[1]
    ITEMS: tl.constexpr = SIZES[3]
    PADDED: tl.constexpr = SIZES[4]
    CHUNK: tl.constexpr = SIZES[5]
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    row = item // HEADS
    clip, position, head = (row // positions).to(tl.int64), (row % positions).to(tl.int64), (item % HEADS).to(tl.int64)
    of_item = (clip * strides[0] + position * strides[2] + head * HEAD_STRIDE)[:, None, None]
    here = (item < items)[:, None, None]
    frame, element = tl.arange(0, PADDED), tl.arange(0, CHUNK)
    of_frame, shown = frame.to(tl.int64) * strides[1], frame < FRAMES
    if TURNED:
        element = element[None, :, None]
        of_frame, shown = of_frame[None, None, :], shown[None, None, :]
    else:
        element = element[None, None, :]
        of_frame, shown = of_frame[None, :, None], shown[None, :, None]
    return ptr + (of_item + of_frame + element), here & shown, element


@triton.jit
def _load(tile, chunk: tl.constexpr, SIZES: tl.constexpr, OPERAND: tl.constexpr):
    """The neighbours of one chunk; zeros where there is nothing."""
    pointers, there, element = tile
    first = chunk * SIZES[5]
    return tl.load(pointers + first, mask=there & (first + element < SIZES[2]), other=0.0).to(OPERAND)


@triton.jit
def _store(tile, chunk: tl.constexpr, x, SIZES: tl.constexpr):
    pointers, there, element = tile
    first = chunk * SIZES[5]
    x = x.to(pointers.dtype.element_ty)
    tl.store(pointers + first, x, mask=there & (first + element < SIZES[2]))


@triton.jit
def _softmax(scores, scale, SIZES: tl.constexpr):
    """Over the frames that are there."""
    FRAMES: tl.constexpr = SIZES[1]
    PADDED: tl.constexpr = SIZES[4]
    shown = (tl.arange(0, PADDED) < FRAMES)[None, None, :]
    scores = tl.where(shown, scores * (scale * _LOG2E), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None]


# k, and in the backward v, are loaded turned: a turn of what is loaded already would go through shared memory, and with
# a barrier between two loads the second waits for the first.
@triton.jit(do_not_specialize=["items", "positions"])
def _temporal_fwd_kernel(
    q, k, v, out, items, positions, scale, SIZES: tl.constexpr, CHUNKS: tl.constexpr, OPERAND: tl.constexpr
):
    """o of a program's items. A tensor comes as its pointer, its strides of clip, frame, position, and of a head."""
    ITEMS: tl.constexpr = SIZES[3]
    PADDED: tl.constexpr = SIZES[4]
    q, k = _tile(q, items, positions, SIZES, False), _tile(k, items, positions, SIZES, True)
    v, out = _tile(v, items, positions, SIZES, False), _tile(out, items, positions, SIZES, False)
    qs, ks, vs = (), (), ()
    for chunk in tl.static_range(CHUNKS):
        qs = qs + (_load(q, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
        ks = ks + (_load(k, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
        vs = vs + (_load(v, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
    scores = tl.zeros([ITEMS, PADDED, PADDED], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        scores = tl.dot(qs[chunk], ks[chunk], scores, input_precision="ieee")
    weights = _softmax(scores, scale, SIZES).to(OPERAND)
    for chunk in tl.static_range(CHUNKS):
        _store(out, chunk, tl.dot(weights, vs[chunk], input_precision="ieee"), SIZES)


@triton.jit(do_not_specialize=["items", "positions"])
def _temporal_bwd_kernel(
    q, k, v, grad_out, grad_q, grad_k, grad_v, items, positions, scale,
    SIZES: tl.constexpr, CHUNKS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of a program's items, from q, k, v and do."""
    ITEMS: tl.constexpr = SIZES[3]
    PADDED: tl.constexpr = SIZES[4]
    q, grad_out = _tile(q, items, positions, SIZES, False), _tile(grad_out, items, positions, SIZES, False)
    k, v = _tile(k, items, positions, SIZES, True), _tile(v, items, positions, SIZES, True)
    qs, ks, vs, gs = (), (), (), ()
    for chunk in tl.static_range(CHUNKS):
        qs = qs + (_load(q, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
        ks = ks + (_load(k, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
        vs = vs + (_load(v, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
        gs = gs + (_load(grad_out, chunk, SIZES, OPERAND),)  # type: ignore[assignment]
    scores = tl.zeros([ITEMS, PADDED, PADDED], tl.float32)
    slopes = tl.zeros([ITEMS, PADDED, PADDED], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        scores = tl.dot(qs[chunk], ks[chunk], scores, input_precision="ieee")
        slopes = tl.dot(gs[chunk], vs[chunk], slopes, input_precision="ieee")
    weights = _softmax(scores, scale, SIZES)
    slopes = weights * (slopes - tl.sum(weights * slopes, 2)[:, :, None]) * scale
    weights = tl.permute(weights.to(OPERAND), (0, 2, 1))
    slopes = tl.permute(slopes.to(OPERAND), (0, 2, 1))
    grad_q = _tile(grad_q, items, positions, SIZES, True)
    grad_k, grad_v = _tile(grad_k, items, positions, SIZES, False), _tile(grad_v, items, positions, SIZES, False)
    for chunk in tl.static_range(CHUNKS):
        _store(grad_v, chunk, tl.dot(weights, gs[chunk], input_precision="ieee"), SIZES)
        _store(grad_q, chunk, tl.dot(ks[chunk], slopes, input_precision="ieee"), SIZES)
        _store(grad_k, chunk, tl.dot(slopes, qs[chunk], input_precision="ieee"), SIZES)


@cache
def division(heads: int, frames: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """How the work is divided: the sizes of a tile, and warps, by what an item takes of registers and shared memory.

    Half precision: a warp an item, as many items a program as leave it 40 KiB of shared memory or less. float32, whose
    products run outside the tensor cores: an item a program, and as many warps as give a thread 16 bytes of a tile.
    """
    padded = 16 if frames <= 16 else 32  # products of tiles take 16 or more
    chunk = 32 if width % 32 == 0 else 16
    elements = padded * width
    if dtype == torch.float32:
        items, warps = 1, padded * chunk // 128
    else:
        items = warps = 4 if elements <= 1280 else (2 if elements <= 2560 else 1)
    sizes = (heads, frames, width, items, padded, chunk)
    return {"SIZES": sizes, "CHUNKS": -(-width // chunk), "num_warps": warps}


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """One launch over all items of (B, F, P, H, D) tensors."""
    clips, frames, positions, heads, width = tensors[0].shape
    items = clips * positions * heads
    assert frames <= 32 and width <= 160 and items < 2**31 - 4
    assert all(x.stride(4) == 1 or width == 1 for x in tensors)
    parts = division(heads, frames, width, tensors[0].dtype)
    operand = tl.float32 if INTERPRETED else _OPERANDS[tensors[0].dtype]
    with torch.cuda.device_of(tensors[0]):
        kernel[(-(-items // parts["SIZES"][3]),)](
            *((x, x.stride()[:3], tl.constexpr(x.stride(3))) for x in tensors),
            items, positions, width**-0.5, OPERAND=operand, **parts,
            enable_fp_fusion=True,  # stated, since triton 3.10 changes the default
        )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    """New memory in the layout of `x`, without its gaps."""
    made = torch.empty_like(x)
    # Where positions share memory, the order of dims is not what it was.
    return made if made.stride(4) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o, in the layout of `q`."""
    out = _like(q)
    _launch(_temporal_fwd_kernel, q, k, v, out)
    return out


def backward(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, in the layouts of `q`, `k`, `v`."""
    if grad_out.stride(4) != 1:  # that of a sum: one number for all
        grad_out = grad_out.contiguous()
    grads = _like(q), _like(k), _like(v)
    _launch(_temporal_bwd_kernel, q, k, v, grad_out, *grads)
    return grads


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return forward(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        return backward(q, k, v, grad_out)


# What a compiled step calls, as in `operators.py`: torch.compile sees nothing of a kernel.
_operator = torch.library.custom_op("seppo_fast::temporal_attention", forward, mutates_args=())
_gradient = torch.library.custom_op("seppo_fast::temporal_attention_gradient", backward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _like(q)


@_gradient.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _operator_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient(*ctx.saved_tensors, grad_out)


_operator.register_autograd(_operator_backward, setup_context=_save)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` over the frames: (B, F, P, H, D), of the inputs' dtype and in the layout of `q`.

    Args:
        q: (B, F, P, H, D) float32, bfloat16 or float16, F up to 32 and D up to 160, at any strides but for the last
            dim, whose elements lie side by side.
        k: alike, at strides of its own.
        v: alike, at strides of its own.
    """
    if torch.compiler.is_compiling():
        return _operator(q, k, v)
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _TemporalAttention.apply(q, k, v) if tracked else forward(q, k, v)
