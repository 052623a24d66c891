"""From a pair's sums to its flipper, logit, loss and gradient coefficients, and to the means over all pairs.

These are the parts of the kernel in `preference.py` that work on numbers, not latents. Equations and names are there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

SUMS = tl.constexpr(7)  # per pair: m, r and D, each of winner and loser, and the product of the two residuals
RATES = tl.constexpr(4)  # the number of means over the pairs, which are the first elements of the statistics


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _softplus_and_sigmoid(x):
    decay = tl.exp(-tl.abs(x))
    # log1p(decay): log(u) contains the rounding error of u = 1 + decay, which the factor decay / (u - 1) corrects.
    u = 1.0 + decay
    log1p = tl.where(u == 1.0, decay, tl.log(u) * tl.div_rn(decay, tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.maximum(x, 0.0) + log1p, tl.div_rn(tl.where(x >= 0.0, 1.0, decay), u)


@triton.jit
def judge(pair, mask, sums, pairs, size, options, results, HAS_REF: tl.constexpr):
    """Computes and stores mean errors, flipper, logit and coefficients of a block of pairs from their float64 sums."""
    m_w, m_l, r_w, r_l, d_w, d_l, product = sums
    weights_ptr, scale_ptr, half_beta, learn_sign, tie_tol, scale, sft_slope, loser_room = options
    reject_ptr, logit_ptr, model_error_ptr, ref_error_ptr, coefficient_ptr = results
    loser = pair + pairs
    error_w, error_l = (m_w / size).to(tl.float32), (m_l / size).to(tl.float32)
    tl.store(model_error_ptr + pair, error_w, mask=mask)
    tl.store(model_error_ptr + loser, error_l, mask=mask)
    if HAS_REF:
        tl.store(ref_error_ptr + pair, (r_w / size).to(tl.float32), mask=mask)
        tl.store(ref_error_ptr + loser, (r_l / size).to(tl.float32), mask=mask)
        difference_w, difference_l = (d_w / size).to(tl.float32), (d_l / size).to(tl.float32)
    else:
        difference_w = error_w - tl.load(ref_error_ptr + pair, mask=mask, other=0.0)
        difference_l = error_l - tl.load(ref_error_ptr + loser, mask=mask, other=0.0)

    reject = difference_w <= tie_tol
    flip = tl.where(reject, 1.0, learn_sign)
    slope = tl.zeros_like(difference_w) + half_beta
    if weights_ptr is not None:
        slope *= tl.load(weights_ptr + pair, mask=mask, other=0.0)
    negative_logit = slope * (difference_w - flip * difference_l)
    _, sigmoid = _softplus_and_sigmoid(negative_logit)
    if scale_ptr is not None:
        scale *= tl.load(scale_ptr)
    coefficient_w = scale * slope * sigmoid
    coefficient_l = -flip * coefficient_w
    if loser_room is not None:
        opposed = flip * product
        harms = opposed > 0.0
        room = loser_room * m_w / tl.where(harms, opposed, 1.0)
        coefficient_l *= tl.where(harms & (room < 1.0), room, 1.0).to(tl.float32)
    if sft_slope is not None:
        coefficient_w += scale * sft_slope
    tl.store(reject_ptr + pair, reject, mask=mask)
    tl.store(logit_ptr + pair, -negative_logit, mask=mask)
    tl.store(coefficient_ptr + pair, coefficient_w, mask=mask)
    tl.store(coefficient_ptr + loser, coefficient_l, mask=mask)
    return negative_logit, reject, error_w, coefficient_w, coefficient_l


@triton.jit
def _chunk_sums(partials_ptr, pair, mask, HAS_REF: tl.constexpr, HAS_PRODUCT: tl.constexpr, CHUNKS: tl.constexpr):
    """Adds up the sums of a block of pairs over their chunks, first to last."""
    zeros = tl.zeros_like(pair).to(tl.float64)
    m_w, m_l, r_w, r_l, d_w, d_l, product = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for chunk in tl.range(CHUNKS, loop_unroll_factor=2):
        # Bypasses the L1 cache, since other programs wrote these values.
        place = partials_ptr + (pair * CHUNKS + chunk) * SUMS
        m_w += tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
        m_l += tl.load(place + 1, mask=mask, other=0.0, cache_modifier=".cg")
        if HAS_REF:
            r_w += tl.load(place + 2, mask=mask, other=0.0, cache_modifier=".cg")
            r_l += tl.load(place + 3, mask=mask, other=0.0, cache_modifier=".cg")
            d_w += tl.load(place + 4, mask=mask, other=0.0, cache_modifier=".cg")
            d_l += tl.load(place + 5, mask=mask, other=0.0, cache_modifier=".cg")
        if HAS_PRODUCT:
            product += tl.load(place + 6, mask=mask, other=0.0, cache_modifier=".cg")
    return m_w, m_l, r_w, r_l, d_w, d_l, product


@triton.jit
def means(
    loss_ptr, rates_ptr, partials_ptr, pairs, size, options, results,
    HAS_REF: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Computes the loss, its two parts, aaf_rate and implicit_acc over all pairs.

    Pairs whose latents have several chunks are judged here first. The means are taken in float64, so that the mean of B
    equal numbers is exactly that number for every B.
    """
    sft_slope = options[6]
    loss_sum = tl.zeros([LANES], tl.float64)
    winner_sum = tl.zeros([LANES], tl.float64)
    reject_sum = tl.zeros([LANES], tl.float64)
    correct_sum = tl.zeros([LANES], tl.float64)
    for block in range(BLOCKS):
        pair = block * LANES + tl.arange(0, LANES).to(tl.int64)
        mask = pair < pairs
        if CHUNKS == 1:
            reject = tl.load(results[0] + pair, mask=mask, other=0, cache_modifier=".cg") != 0
            negative_logit = -tl.load(results[1] + pair, mask=mask, other=0.0, cache_modifier=".cg")
            if sft_slope is not None:
                error_w = tl.load(results[2] + pair, mask=mask, other=0.0, cache_modifier=".cg")
        else:
            sums = _chunk_sums(partials_ptr, pair, mask, HAS_REF, options[7] is not None, CHUNKS)
            negative_logit, reject, error_w, _, _ = judge(pair, mask, sums, pairs, size, options, results, HAS_REF)
        loss, _ = _softplus_and_sigmoid(negative_logit)
        if sft_slope is not None:
            winner_sum += tl.where(mask, error_w, 0.0).to(tl.float64)
        invalid = mask & (negative_logit != negative_logit)
        loss_sum += tl.where(mask, loss, 0.0).to(tl.float64)
        reject_sum += tl.where(invalid, float("nan"), (mask & reject).to(tl.float64))
        correct_sum += tl.where(invalid, float("nan"), (mask & (negative_logit < 0.0)).to(tl.float64))
    totals = tl.reduce((loss_sum, reject_sum, correct_sum, winner_sum), 0, _add4)
    loss_sum, reject_sum, correct_sum, winner_sum = totals
    preference_loss = (loss_sum / pairs).to(tl.float32)
    sft_loss = 0.0
    if sft_slope is not None:
        sft_loss = sft_slope * (winner_sum / pairs).to(tl.float32)
    tl.store(loss_ptr, preference_loss + sft_loss)
    tl.store(rates_ptr, (reject_sum / pairs).to(tl.float32))
    tl.store(rates_ptr + 1, (correct_sum / pairs).to(tl.float32))
    tl.store(rates_ptr + 2, preference_loss)
    tl.store(rates_ptr + 3, sft_loss)
