"""The PyTorch twin of every kernel: the path taken on a CPU, the tests' oracle and the benchmarks' baseline.

Shapes: R rows (2B: the winners' half first), B pairs, S target rows (R, or R / 2 when both halves share the target),
N elements of one latent; a target may also come as (S, *dims), its dims in the order of N. All of it is plain
torch code; inputs of any float dtype are taken to float32 first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def denoising_errors(pred_RN: Tensor, target: Tensor) -> Tensor:
    """`m = mean_N (p - y)^2` of each row: (R,) float32, differentiable."""
    target_SN = target.flatten(1)
    residual = _by_target(pred_RN, target_SN) - target_SN.float()
    return _mean(residual.square()).flatten()


def error_differences(pred_RN: Tensor, ref_pred_RN: Tensor, target: Tensor) -> Tensor:
    """`D = mean_N (p - q)(p + q - 2y)`, equal to m - r without subtracting two nearly equal means: (R,) float32."""
    target_SN = target.flatten(1)
    pred, ref_pred = _by_target(pred_RN, target_SN), _by_target(ref_pred_RN, target_SN)
    return _mean((pred - ref_pred) * (pred + ref_pred - 2 * target_SN.float())).flatten()


def preference(
    pred_RN: Tensor,
    target: Tensor,
    ref_pred_RN: Tensor | None,
    ref_error_R: Tensor | None,
    weights_B: Tensor | None,
    beta: float,
    learn_sign: float,
    tie_tol: float,
) -> PreferenceTensors:
    """`mean_B softplus((beta/2) omega (D_w - a D_l))` (SePPO, eq. 8-10 and appendix B.2).

    Args:
        pred_RN: policy predictions; the only input that a gradient is meant for.
        target: training targets.
        ref_pred_RN: reference predictions, or None when `ref_error_R` is given.
        ref_error_R: float32 reference errors, or None when `ref_pred_RN` is given.
        weights_B: omega, or None for 1.
        beta: multiplies a mean over latent elements.
        learn_sign: `a` of the pairs that fail the anchor test: -1 adaptive, 0 indicator, +1 never flipped.
        tie_tol: D_w up to this passes the anchor test.

    Returns:
        loss (), reject (B,), logit (B,), model_error (R,), ref_error (R,), aaf_rate (), implicit_acc (); only the
        loss carries a gradient.
    """
    model_error = denoising_errors(pred_RN, target)
    if ref_pred_RN is not None:
        ref_error = denoising_errors(ref_pred_RN, target)
        difference = error_differences(pred_RN, ref_pred_RN, target)
    else:
        assert ref_error_R is not None
        ref_error = ref_error_R
        difference = model_error - ref_error
    difference_w, difference_l = difference.chunk(2)

    reject = difference_w.detach() <= tie_tol
    flip = torch.where(reject, 1.0, learn_sign)
    # A product, not a choice: with a = 0 a NaN in D_l must still reach the loss.
    logit = -0.5 * beta * (difference_w - flip * difference_l)
    if weights_B is not None:
        logit = weights_B * logit
    loss = _mean(F.softplus(-logit))

    logit = logit.detach()
    invalid = logit.isnan()
    aaf_rate = _mean(reject.float().masked_fill(invalid, torch.nan))
    implicit_acc = _mean((logit > 0).float().masked_fill(invalid, torch.nan))
    return loss, reject, logit, model_error.detach(), ref_error, aaf_rate, implicit_acc


@torch.no_grad()
def loss_and_grad(
    pred_RN: Tensor,
    target: Tensor,
    ref_pred_RN: Tensor | None,
    ref_error_R: Tensor | None,
    weights_B: Tensor | None,
    beta: float,
    learn_sign: float,
    tie_tol: float,
    grad_scale: float | Tensor,
    grad_RN: Tensor | None,
) -> tuple[PreferenceTensors, Tensor]:
    """`preference` and `grad_scale dloss/dp` by the formula; with `ref_error_R` the same bits as by autograd.

    Args:
        grad_scale: a number, or a tensor of one float32.
        grad_RN: where the gradient goes, possibly `pred_RN` itself; None: into new memory of its dtype.
    """
    options = (weights_B, beta, learn_sign, tie_tol)
    outputs = preference(pred_RN, target, ref_pred_RN, ref_error_R, *options)
    reject, logit = outputs[1], outputs[2]
    rows, size = pred_RN.shape
    # Each line is a link of autograd's chain, with its dtype; a division by a count is one of float64, as in `_mean`.
    each = torch.as_tensor(grad_scale, dtype=torch.float32, device=pred_RN.device).reshape(())
    each = (each.double() / len(logit)).float().expand_as(logit)
    margin = -torch.ops.aten.softplus_backward(each, -logit, 1.0, 20.0)
    if weights_B is not None:
        margin = margin * weights_B
    margin = margin * (-0.5 * beta)
    error = torch.cat([margin, -margin * torch.where(reject, 1.0, learn_sign)])
    coefficient = 2 * (error.double() / size).float()
    target_SN = target.flatten(1)
    residual = _by_target(pred_RN, target_SN) - target_SN.float()
    grad = (coefficient.unflatten(0, (-1, len(target_SN)))[..., None] * residual).reshape(rows, size)
    return outputs, grad.to(pred_RN.dtype) if grad_RN is None else grad_RN.copy_(grad)


def _by_target(x_RN: Tensor, target_SN: Tensor) -> Tensor:
    """(R, N) to float32 (R / S, S, N), which broadcasts against the target; a view."""
    return x_RN.float().unflatten(0, (-1, target_SN.shape[0]))


def _mean(x: Tensor) -> Tensor:
    """Mean over the last dim, summed in float64 and rounded once.

    A float32 sum would err by three units of an error near 0.2, which beta multiplies; and the mean of B equal numbers
    is now that number for every B: ln 2 where policy and reference agree, a rate of exactly 1.
    """
    return x.mean(-1, dtype=torch.float64).float()


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` over F frames, for B clips, P positions and H heads of width D.

    Args:
        q: (B, F, P, H, D), at any strides.
        k: alike.
        v: alike.

    Returns:
        (B, F, P, H, D) of the inputs' dtype; sums and the softmax are in float32, for float64 inputs in float64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bfphd,bgphd->bphfg", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    return torch.einsum("bphfg,bgphd->bfphd", scores.softmax(-1), v.to(dtype)).to(q.dtype)
