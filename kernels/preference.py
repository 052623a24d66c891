"""Triton kernel of the preference loss, which can write the loss's gradient in the same pass.

With predictions p (policy) and q (reference), target y, N elements per latent, winners first, and a weight omega per
pair (`weights_B`; 1 if that is None):

    m = mean_N (p - y)^2    r = mean_N (q - y)^2    D = mean_N (p - q)((p - y) + (q - y)), or m - r if only r is given
    a = +1 where D_w <= tie_tol, else learn_sign
    logit = -(beta/2) omega (D_w - a D_l)           loss = mean_B [softplus(-logit) + v m_w],  v = sft_weight beta/4
    dloss/dp = c (p - y),   c_w = ((beta/2) omega sigmoid(-logit) + v) 2 / (N B)
                            c_l = -a lambda (beta/2) omega sigmoid(-logit) 2 / (N B)

lambda is 1, or with a safeguard min((1 - mu) S_w / s, 1) where s = a sum_N (p_w - y_w)(p_l - y_l) > 0 and
S_w = sum_N (p_w - y_w)^2 (Diffusion-SDPO's winner-preserving scale). This needs one more sum, over values that are in
registers anyway.

A program reads both halves of a pair, so a target that they share is read once. If a latent fits in one chunk (up to
16,384 elements; see `denoising_error.py`), it stays in registers until its gradient is written: one launch. A larger
latent is divided into chunks, one per program, and a second launch writes the gradient. The program that finishes last
computes the means over the pairs. (A compiled step, or one captured in a graph, also zeroes the four bytes that count
the finished programs.)

Byte model: latents moved per pair if the target is shared (if not, add one for each time it is read), each of N x
element size bytes:

                                       with ref_pred                             with ref_error
    loss_and_grad, one chunk           p_w p_l q_w q_l y  ->  g_w g_l      7     p_w p_l y  ->  g_w g_l            5
    loss_and_grad, chunks              the same, p_w p_l y once more      10     the same, p_w p_l y once more     8
    through autograd                   the same, p_w p_l y once more      10     the same, p_w p_l y once more     8

Shapes are named as in `eager.py`, the PyTorch twin.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from seppo_fast.kernels.denoising_error import (
    EXACT,
    by_four,
    denoising_errors,
    dense_like,
    division,
    layout,
    load,
    load_target,
    write_gradient,
)
from seppo_fast.kernels.eager import LossForm, PreferenceTensors
from seppo_fast.kernels.pair_loss import RATES, SUMS, judge, means

__all__ = ["denoising_errors", "loss_and_grad", "preference"]

PAIR_LANES = 1024  # the most pairs per block in the means over the pairs; with several chunks, one pair per thread


@triton.jit
def _add6(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@triton.jit
def _add_fold(sums, offsets, size, rows, HAS_REF: tl.constexpr, SHARED: tl.constexpr, LAYOUT: tl.constexpr):
    """Adds one fold of a pair's elements to its sums of m, r and D; also returns the policy's residuals p - y."""
    m_w, m_l, r_w, r_l, d_w, d_l = sums
    target_w = load_target(rows[2], offsets, size, LAYOUT)
    target_l = target_w if SHARED else load_target(rows[3], offsets, size, LAYOUT)
    pred_w, pred_l = load(rows[0], offsets, size), load(rows[1], offsets, size)
    residual_w, residual_l = pred_w - target_w, pred_l - target_l
    m_w += by_four(residual_w * residual_w)
    m_l += by_four(residual_l * residual_l)
    if HAS_REF:
        ref_w, ref_l = load(rows[4], offsets, size), load(rows[5], offsets, size)
        ref_residual_w, ref_residual_l = ref_w - target_w, ref_l - target_l
        r_w += by_four(ref_residual_w * ref_residual_w)
        r_l += by_four(ref_residual_l * ref_residual_l)
        d_w += by_four((pred_w - ref_w) * (residual_w + ref_residual_w))
        d_l += by_four((pred_l - ref_l) * (residual_l + ref_residual_l))
    return (m_w, m_l, r_w, r_l, d_w, d_l), residual_w, residual_l


# do_not_specialize: no recompilation for another number of pairs or another alignment of these vectors.
@triton.jit(do_not_specialize=["pairs", "ref_error_ptr", "weights_ptr", "scale_ptr"])
def _preference_fwd_kernel(
    pred_ptr, target_ptr, ref_pred_ptr, ref_error_ptr, weights_ptr, scale_ptr,
    loss_ptr, reject_ptr, statistics_ptr, grad_ptr, partials_ptr, ticket_ptr,
    size, pairs, pred_stride, target_stride, ref_pred_stride, grad_stride,
    half_beta, learn_sign, tie_tol, scale, sft_slope, loser_room,
    LAYOUT: tl.constexpr, SHARED: tl.constexpr, CHUNKS: tl.constexpr, FOLDS: tl.constexpr, LANES: tl.constexpr,
    PAIR_BLOCKS: tl.constexpr, PAIR_LANES: tl.constexpr,
):  # fmt: skip
    """Reduces one chunk of one pair. With `grad_ptr`, which requires one chunk per latent, it also writes the gradient.

    The program that finishes last computes the means over the pairs.
    """
    HAS_REF: tl.constexpr = ref_pred_ptr is not None
    program = tl.program_id(0)
    winner = (program // CHUNKS).to(tl.int64)
    loser = winner + pairs
    start = program % CHUNKS * (FOLDS * LANES)
    rows = (
        pred_ptr + winner * pred_stride, pred_ptr + loser * pred_stride,
        target_ptr + winner * target_stride, target_ptr + loser * target_stride,
        ref_pred_ptr + winner * ref_pred_stride if HAS_REF else None,
        ref_pred_ptr + loser * ref_pred_stride if HAS_REF else None,
    )  # fmt: skip
    options = (weights_ptr, scale_ptr, half_beta, learn_sign, tie_tol, scale, sft_slope, loser_room)
    logit_ptr = statistics_ptr + RATES
    model_error_ptr = logit_ptr + pairs
    results = (reject_ptr, logit_ptr, model_error_ptr, ref_error_ptr, model_error_ptr + 2 * pairs)

    zeros = tl.zeros([LANES // 4], tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros)
    product = zeros
    residuals_w, residuals_l = (), ()
    if grad_ptr is None:
        for fold in range(FOLDS):
            offsets = start + fold * LANES + tl.arange(0, LANES)
            sums, residual_w, residual_l = _add_fold(sums, offsets, size, rows, HAS_REF, SHARED, LAYOUT)
            if loser_room is not None:
                product += by_four(residual_w * residual_l)
    else:
        for fold in tl.static_range(FOLDS):
            offsets = start + fold * LANES + tl.arange(0, LANES)
            sums, residual_w, residual_l = _add_fold(sums, offsets, size, rows, HAS_REF, SHARED, LAYOUT)
            if loser_room is not None:
                product += by_four(residual_w * residual_l)
            residuals_w = residuals_w + (residual_w,)  # type: ignore[assignment]
            residuals_l = residuals_l + (residual_l,)  # type: ignore[assignment]
    m_w, m_l, r_w, r_l, d_w, d_l = sums
    sums = (
        m_w.to(tl.float64), m_l.to(tl.float64), r_w.to(tl.float64),
        r_l.to(tl.float64), d_w.to(tl.float64), d_l.to(tl.float64),
    )  # fmt: skip
    sums = tl.reduce(sums, 0, _add6)
    product = tl.sum(product.to(tl.float64), 0) if loser_room is not None else 0.0

    if CHUNKS == 1:
        pair = winner + tl.arange(0, 1)
        sums = sums + (product,)
        _, _, _, coefficient_w, coefficient_l = judge(pair, pair >= 0, sums, pairs, size, options, results, HAS_REF)
        if grad_ptr is not None:
            for fold in tl.static_range(FOLDS):
                offsets = fold * LANES + tl.arange(0, LANES)
                mask = offsets < size
                grad_w = (coefficient_w * residuals_w[fold]).to(grad_ptr.dtype.element_ty)
                grad_l = (coefficient_l * residuals_l[fold]).to(grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + winner * grad_stride + offsets, grad_w, mask=mask)
                tl.store(grad_ptr + loser * grad_stride + offsets, grad_l, mask=mask)
    else:
        mine = partials_ptr + program.to(tl.int64) * SUMS
        tl.store(mine, sums[0])
        tl.store(mine + 1, sums[1])
        if HAS_REF:
            tl.store(mine + 2, sums[2])
            tl.store(mine + 3, sums[3])
            tl.store(mine + 4, sums[4])
            tl.store(mine + 5, sums[5])
        if loser_room is not None:
            tl.store(mine + 6, product)

    # All stores of this program's threads come before its ticket, whose atomic add releases and acquires.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == tl.num_programs(0) - 1:
        tl.store(ticket_ptr, 0)  # for the next launch
        means(
            loss_ptr, statistics_ptr, partials_ptr, pairs, size, options, results,
            HAS_REF, CHUNKS, PAIR_BLOCKS, PAIR_LANES,
        )  # fmt: skip


_tickets: dict[tuple[int, int], Tensor] = {}


def _ticket(device: torch.device, own: bool) -> Tensor:
    """Returns the counter of finished programs for the current stream. It is zero before and after each launch.

    There is one counter per stream, since launches in a stream never overlap. With `own` a new one is made, because a
    compiled step may run on memory that belongs to its own CUDA graphs.
    """
    if own or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        # A captured graph gets its own counter, zeroed at each replay: replays may run in parallel with this stream.
        return torch.zeros(1, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (index, torch._C._cuda_getCurrentRawStream(index))  # `current_stream` would make an object per launch
    if key not in _tickets:
        ticket = torch.zeros(1, dtype=torch.int32, device=device)
        if type(ticket) is not Tensor:  # a fake tensor, which must not be kept
            return ticket
        _tickets[key] = ticket
    return _tickets[key]


def forward(
    pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    weights: Tensor | None,
    form: LossForm,
    grad_scale: float | Tensor = 1.0,
    grad: Tensor | None = None,
    *,
    own_ticket: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes loss (), reject (B,) and statistics; writes `grad_scale dloss/dp` to `grad` if that is given.

    The statistics are one tensor, to allocate and pass once: aaf_rate, implicit_acc, the two parts of the loss, B
    logits, 2B errors of the policy, 2B coefficients of the gradient and, if `ref_pred` is given, 2B errors of the
    reference.
    """
    rows, size = pred.shape
    pairs = rows // 2
    assert all(x is None or x.stride(1) == 1 or size == 1 for x in (pred, ref_pred, grad))
    device = pred.device
    target, places = layout(target)
    parts = division(size, device)
    # Offsets have 32 bits, including those beyond the end, which are masked.
    assert parts["CHUNKS"] * parts["FOLDS"] * parts["LANES"] < 2**31
    programs = pairs * parts["CHUNKS"]
    loss = torch.empty((), dtype=torch.float32, device=device)
    reject = torch.empty(pairs, dtype=torch.bool, device=device)
    statistics = torch.empty(statistics_size(pairs, ref_pred is not None), dtype=torch.float32, device=device)
    partials = None
    if programs > pairs:
        partials = torch.empty(SUMS.value * programs, dtype=torch.float64, device=device)
    written = grad if programs == pairs else None
    scale, on_device = 2 / (size * pairs), isinstance(grad_scale, Tensor)
    # With several chunks, the means also add up seven sums per pair. One pair per thread then needs few enough
    # registers for several programs to run at a time.
    most = min(PAIR_LANES, (256 if programs == pairs else 32) * parts["num_warps"])
    pair_lanes = min(most, max(16, 1 << (pairs - 1).bit_length()))
    with torch.cuda.device_of(pred):
        _preference_fwd_kernel[(programs,)](
            pred, target, ref_pred, statistics[RATES.value + 5 * pairs :] if ref_error is None else ref_error,
            weights, grad_scale if on_device else None,
            loss, reject, statistics, written, partials, _ticket(device, own_ticket),
            size, pairs, pred.stride(0), target.stride(0),
            0 if ref_pred is None else ref_pred.stride(0), 0 if written is None else written.stride(0),
            0.5 * form.beta, form.learn_sign, form.tie_tol, scale if on_device else scale * grad_scale,
            form.sft_slope, form.loser_room,
            LAYOUT=places, SHARED=len(target) == pairs, **parts,
            PAIR_BLOCKS=-(-pairs // pair_lanes), PAIR_LANES=pair_lanes, **EXACT,
        )  # fmt: skip
    if grad is not None and written is None:
        write_gradient(pred, target, coefficients(statistics, pairs), 1.0, grad)
    return loss, reject, statistics


def statistics_size(pairs: int, has_ref: bool) -> int:
    """Returns the number of elements of `statistics`; see `forward`."""
    return RATES.value + (7 if has_ref else 5) * pairs


def coefficients(statistics: Tensor, pairs: int) -> Tensor:
    """Returns the part of `statistics` that holds the coefficients c, (2B,)."""
    return statistics[RATES.value + 3 * pairs : RATES.value + 5 * pairs]


class _Preference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, reject, statistics = forward(pred, target, *rest)
        # `.data`: in-place changes of a statistic by the caller must not invalidate the saved coefficients.
        ctx.save_for_backward(pred, target, coefficients(statistics.data, len(reject)))
        ctx.mark_non_differentiable(reject, statistics)
        ctx.set_materialize_grads(False)  # else each output without a gradient costs a launch to make zeros
        return loss, reject, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        pred, target, coefficient = ctx.saved_tensors
        grad = None if grad_loss is None else write_gradient(pred, target, coefficient, grad_loss, dense_like(pred))
        return grad, *[None] * 5


def named(loss: Tensor, reject: Tensor, statistics: Tensor, ref_error: Tensor | None) -> PreferenceTensors:
    """Splits the statistics; returns the tensors that `eager.preference` returns."""
    pairs = reject.shape[0]
    sizes = [RATES.value, pairs, 2 * pairs, 2 * pairs] + ([2 * pairs] if ref_error is None else [])
    rates, logit, model_error, _, *made = statistics.detach().split(sizes)
    ref_error = made[0] if ref_error is None else ref_error
    return loss, reject, logit, model_error, ref_error, *rates.unbind()


def preference(
    pred_RN: Tensor,
    target: Tensor,
    ref_pred_RN: Tensor | None,
    ref_error_R: Tensor | None,
    weights_B: Tensor | None,
    form: LossForm,
) -> PreferenceTensors:
    """Computes the loss; arguments and results are those of `eager.preference`.

    `weights_B` and `ref_error_R` must be dense float32. Predictions may have any stride between rows, but each row must
    be contiguous.
    """
    inputs = (pred_RN, target, ref_pred_RN, ref_error_R, weights_B, form)
    tracked = torch.is_grad_enabled() and pred_RN.requires_grad
    loss, reject, statistics = _Preference.apply(*inputs) if tracked else forward(*inputs)
    return named(loss, reject, statistics, ref_error_R)


def loss_and_grad(
    pred_RN: Tensor,
    target: Tensor,
    ref_pred_RN: Tensor | None,
    ref_error_R: Tensor | None,
    weights_B: Tensor | None,
    form: LossForm,
    grad_scale: float | Tensor,
    grad_RN: Tensor | None,
) -> tuple[PreferenceTensors, Tensor]:
    """Computes loss and gradient; arguments and results are those of `eager.loss_and_grad`."""
    inputs = (pred_RN, target, ref_pred_RN, ref_error_R, weights_B, form)
    grad = dense_like(pred_RN) if grad_RN is None else grad_RN
    return named(*forward(*inputs, grad_scale, grad), ref_error_R), grad
