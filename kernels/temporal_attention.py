"""Triton kernels of attention over frames at each position of a clip, `softmax(q k^T / sqrt(D)) v`, and its gradient.

    S = q k^T / sqrt(D)    P = softmax(S)    o = P v
    dv = P^T do    dP = do v^T    dS = P (dP - rowsum(P dP)) / sqrt(D)    dq = dS k    dk = dS^T q

A clip has at most 32 frames, so the scores of one position and head are one small tile. In half precision each warp
computes a tile alone. No barrier separates its loads, so their memory latencies overlap. Items are counted along one
axis of the grid, so there may be nearly 2^31 of them. q, k and v are read in place by their strides: frames may be an
outer dim of the positions, as in the features of a UNet, or an inner one, as motion modules transpose them.

Bytes moved, in units of B F P H D times the element size. Each pass is one launch, and no statistics of the softmax are
stored in between:

    forward    q k v     ->  o           4
    backward   q k v do  ->  dq dk dv    7

The backward recomputes the softmax from q and k, which it reads anyway. Stored log-sums would add bytes and save
nothing, since S must be recomputed all the same. rowsum(P dP) replaces rowsum(do o), so o is not read either.

Operands of the products have the inputs' dtype; sums and the softmax are in float32. P and dS are rounded to the
inputs' dtype, as in other fused attention. float32 inputs are not rounded to TF32. Under the interpreter, whose
bfloat16 arithmetic is wrong, operands are float32 whatever the inputs are.

Shapes: B clips, F frames, P positions, H heads, D width of a head. An item is one head at one position of one clip.
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
    """Locates a program's items in a tensor.

    Returns pointers to the first CHUNK elements of each head, (ITEMS, PADDED, CHUNK), or transposed (ITEMS, CHUNK,
    PADDED) if TURNED; a mask of the items and frames that exist; and the elements' indices.
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
    """Loads one chunk of the heads' elements; zeros where the mask is off."""
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
    """Computes the softmax over the existing frames, without the padding."""
    FRAMES: tl.constexpr = SIZES[1]
    PADDED: tl.constexpr = SIZES[4]
    shown = (tl.arange(0, PADDED) < FRAMES)[None, None, :]
    scores = tl.where(shown, scores * (scale * _LOG2E), float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None]


# k, and in the backward v, are loaded transposed. Transposing loaded data would go through shared memory, whose barrier
# between two loads would make the second wait for the first.
@triton.jit(do_not_specialize=["items", "positions"])
def _temporal_fwd_kernel(
    q, k, v, out, items, positions, scale, SIZES: tl.constexpr, CHUNKS: tl.constexpr, OPERAND: tl.constexpr
):
    """Computes o of a program's items.

    Each tensor is a tuple: its pointer, its strides of clip, frame and position, and its stride of heads.
    """
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
    """Computes dq, dk and dv of a program's items from q, k, v and do."""
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
    """Returns the sizes of a program's tile and its number of warps, chosen by an item's registers and shared memory.

    In half precision: one warp per item, and as many items per program as fit in 40 KiB of shared memory. In float32,
    whose products do not run on tensor cores: one item per program, and so many warps that a thread has 16 bytes of a
    tile.
    """
    padded = 16 if frames <= 16 else 32  # `tl.dot` needs sides of at least 16
    chunk = 32 if width % 32 == 0 else 16
    elements = padded * width
    if dtype == torch.float32:
        items, warps = 1, padded * chunk // 128
    else:
        items = warps = 4 if elements <= 1280 else (2 if elements <= 2560 else 1)
    sizes = (heads, frames, width, items, padded, chunk)
    return {"SIZES": sizes, "CHUNKS": -(-width // chunk), "num_warps": warps}


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """Launches a kernel once, over all items of (B, F, P, H, D) tensors."""
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
            enable_fp_fusion=True,  # explicit, since triton 3.10 changes the default
        )  # fmt: skip


def _like(x: Tensor) -> Tensor:
    """Returns new memory in the layout of `x`, without its gaps."""
    made = torch.empty_like(x)
    # If elements of `x` share memory (expanded dims), `empty_like` can choose another order of dims.
    return made if made.stride(4) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns o in the memory layout of `q`."""
    out = _like(q)
    _launch(_temporal_fwd_kernel, q, k, v, out)
    return out


def backward(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv in the memory layouts of `q`, `k` and `v`."""
    if grad_out.stride(4) != 1:  # for example the gradient of a sum, which is one expanded number
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


# Custom operators for compiled steps, as in `torch_ops.py`: torch.compile does not look inside a kernel.
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
    """Computes `softmax(q k^T / sqrt(D)) v` over the frames, differentiable in all three inputs.

    Args:
        q: the queries: (B, F, P, H, D) float32, bfloat16 or float16, with F up to 32 and D up to 160, at any strides
            except that the last dim must have stride 1.
        k: the keys, like `q`, at their own strides.
        v: the values, like `q`, at their own strides.

    Returns:
        (B, F, P, H, D) in the inputs' dtype and in the memory layout of `q`.
    """
    if torch.compiler.is_compiling():
        return _operator(q, k, v)
    tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _TemporalAttention.apply(q, k, v) if tracked else forward(q, k, v)
