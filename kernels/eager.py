"""The PyTorch twins of the kernels, in plain PyTorch: used on CPUs, as the tests' oracle and the benchmarks' baseline.

Shapes: R rows (2B, the winners' half first), B pairs, S target rows (R, or R / 2 if both halves share the target), N
elements per latent. A target may also be (S, *dims), with its dims in the order of N. Inputs of any float dtype are
converted to float32 first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PreferenceTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class LossForm(NamedTuple):
    """The options that select one of the preference losses.

    Attributes:
        beta: the strength of the pull towards the reference; it multiplies a mean over latent elements.
        learn_sign: the value of `a` for pairs that fail the anchor test: -1 adaptive, 0 indicator, +1 never flipped.
        tie_tol: the largest D_w that passes the anchor test.
        sft_weight: the weight of the term `(beta/4) m_w` that is added for each pair.
        safeguard: mu of the winner-preserving scale of the losers' gradients; None turns scaling off.
    """

    beta: float
    learn_sign: float
    tie_tol: float
    sft_weight: float = 0.0
    safeguard: float | None = None

    @property
    def sft_slope(self) -> float | None:
        """Returns the factor of m_w in the term that `sft_weight` adds to a pair's loss; None without that term."""
        return 0.25 * self.beta * self.sft_weight if self.sft_weight else None

    @property
    def loser_room(self) -> float | None:
        """Returns 1 - mu, the share of a winner's progress that its loser may undo; None without a safeguard."""
        return None if self.safeguard is None else 1 - self.safeguard


def denoising_errors(pred_RN: Tensor, target: Tensor) -> Tensor:
    """Computes `m = mean_N (p - y)^2` of each row: (R,) float32, differentiable."""
    target_SN = target.flatten(1)
    residual = _by_target(pred_RN, target_SN) - target_SN.float()
    return _mean(residual.square()).flatten()


def error_differences(pred_RN: Tensor, ref_pred_RN: Tensor, target: Tensor) -> Tensor:
    """Computes `D = mean_N (p - q)(p + q - 2y)`: m - r, without subtracting two nearly equal means. (R,) float32."""
    target_SN = target.flatten(1)
    pred, ref_pred = _by_target(pred_RN, target_SN), _by_target(ref_pred_RN, target_SN)
    return _mean((pred - ref_pred) * (pred + ref_pred - 2 * target_SN.float())).flatten()


def preference(
    pred_RN: Tensor,
    target: Tensor,
    ref_pred_RN: Tensor | None,
    ref_error_R: Tensor | None,
    weights_B: Tensor | None,
    form: LossForm,
) -> PreferenceTensors:
    """Computes `mean_B [softplus((beta/2) omega (D_w - a D_l)) + sft_weight (beta/4) m_w]`.

    (SePPO, eq. 8-10 and appendix B.2.)

    Args:
        pred_RN: the policy's predictions, the only input that should require a gradient.
        target: the training targets.
        ref_pred_RN: the reference's predictions, or None if `ref_error_R` is given.
        ref_error_R: the reference's float32 errors, or None if `ref_pred_RN` is given.
        weights_B: omega, or None for 1.
        form: the loss to compute.

    Returns:
        loss (), reject (B,), logit (B,), model_error (R,), ref_error (R,), aaf_rate (), implicit_acc (), and the two
        parts of the loss (), preference_loss and sft_loss. Only the loss carries a gradient.
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

    reject = difference_w.detach() <= form.tie_tol
    flip = torch.where(reject, 1.0, form.learn_sign)
    if form.safeguard is not None and difference_l.requires_grad:
        difference_l = _ScaledGradient.apply(difference_l, loser_scale(pred_RN.detach(), target, flip, form))
    # A product, not torch.where: with a = 0, a NaN in D_l must still reach the loss.
    logit = -0.5 * form.beta * (difference_w - flip * difference_l)
    if weights_B is not None:
        logit = weights_B * logit
    loss = preference_loss = _mean(F.softplus(-logit))
    sft_loss = torch.zeros_like(loss)
    if form.sft_slope is not None:
        sft_loss = form.sft_slope * _mean(model_error.chunk(2)[0])
        loss = preference_loss + sft_loss

    logit = logit.detach()
    invalid = logit.isnan()
    aaf_rate = _mean(reject.float().masked_fill(invalid, torch.nan))
    implicit_acc = _mean((logit > 0).float().masked_fill(invalid, torch.nan))
    parts = preference_loss.detach(), sft_loss.detach()
    return loss, reject, logit, model_error.detach(), ref_error, aaf_rate, implicit_acc, *parts


@torch.no_grad()
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
    """Computes `preference`, and `grad_scale dloss/dp` by its formula. With `ref_error_R` the bits equal autograd's.

    Args:
        grad_scale: a number, or a float32 tensor with one element.
        grad_RN: where to write the gradient, possibly `pred_RN` itself; None for new memory of its dtype.
    """
    outputs = preference(pred_RN, target, ref_pred_RN, ref_error_R, weights_B, form)
    reject, logit = outputs[1], outputs[2]
    rows, size = pred_RN.shape
    # Each line is one step of autograd's chain, in the same dtype; divisions by a count are in float64, as in `_mean`.
    scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=pred_RN.device).reshape(())
    each = (scale.double() / len(logit)).float().expand_as(logit)
    margin = -torch.ops.aten.softplus_backward(each, -logit, 1.0, 20.0)
    if weights_B is not None:
        margin = margin * weights_B
    margin = margin * (-0.5 * form.beta)
    flip = torch.where(reject, 1.0, form.learn_sign)
    winner, loser = margin, -margin * flip
    if form.safeguard is not None:
        loser = loser * loser_scale(pred_RN, target, flip, form)
    if form.sft_slope is not None:
        winner = winner + ((scale * form.sft_slope).double() / len(logit)).float()
    error = torch.cat([winner, loser])
    coefficient = 2 * (error.double() / size).float()
    target_SN = target.flatten(1)
    residual = _by_target(pred_RN, target_SN) - target_SN.float()
    grad = (coefficient.unflatten(0, (-1, len(target_SN)))[..., None] * residual).reshape(rows, size)
    return outputs, grad.to(pred_RN.dtype) if grad_RN is None else grad_RN.copy_(grad)


def loser_scale(pred_RN: Tensor, target: Tensor, flip_B: Tensor, form: LossForm) -> Tensor:
    """Computes `lambda = min((1 - mu) |g_w|^2 / s, 1)` where `s = a <g_l, g_w> > 0`, else 1: (B,) float32.

    g is the gradient of each half's error in its prediction, `2 (p - y) / N` (Diffusion-SDPO's scale). A step in output
    space against both halves' gradients, the loser's scaled by lambda, then leaves the winner at least the share mu of
    what its own gradient alone would gain it.
    """
    assert form.loser_room is not None
    target_SN = target.flatten(1)
    residual = (_by_target(pred_RN, target_SN) - target_SN.float()).reshape(2, len(pred_RN) // 2, -1)
    own = residual[0].square().mean(-1, dtype=torch.float64)
    opposed = flip_B * (residual[0] * residual[1]).mean(-1, dtype=torch.float64)
    harms = opposed > 0
    scale = (form.loser_room * own / opposed.where(harms, 1.0)).clamp(max=1.0)
    return scale.where(harms, 1.0).float()


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return grad * scale, None


def _by_target(x_RN: Tensor, target_SN: Tensor) -> Tensor:
    """Returns (R, N) in float32, viewed as (R / S, S, N), which broadcasts against the target."""
    return x_RN.float().unflatten(0, (-1, target_SN.shape[0]))


def _mean(x: Tensor) -> Tensor:
    """Returns the mean over the last dim, summed in float64 and rounded once.

    A float32 sum would be off by three units in the last place of an error near 0.2, which beta multiplies. In float64,
    the mean of B equal numbers is exactly that number for every B: ln 2 where policy and reference agree, a rate of
    exactly 1.
    """
    return x.mean(-1, dtype=torch.float64).float()


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes `softmax(q k^T / sqrt(D)) v` over F frames, for B clips, P positions and H heads of width D.

    Args:
        q: the queries: (B, F, P, H, D), at any strides.
        k: the keys, like `q`.
        v: the values, like `q`.

    Returns:
        (B, F, P, H, D) in the inputs' dtype; sums and the softmax are in float32, or float64 for float64 inputs.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bfphd,bgphd->bphfg", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5
    return torch.einsum("bphfg,bgphd->bfphd", scores.softmax(-1), v.to(dtype)).to(q.dtype)
