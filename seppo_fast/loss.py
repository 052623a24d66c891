"""The preference loss of SePPO and its relatives, for any trainer: predictions and targets in, loss and statistics out.

With per-sample errors m (policy) and r (reference), each the mean squared error over the latent, and D = m - r:

    a = +1 where D_w <= 0 ("reject"), else -1        logit = -(beta/2) omega (D_w - a D_l)
    loss = mean softplus(-logit)

(SePPO, arXiv 2410.05255, eq. 8-10 and appendix B.2; with a = +1 throughout it is Diffusion-DPO.) Two options that are
not in the paper, off by default: `sft_weight` adds plain fine-tuning on the winners, and `safeguard` scales losers'
gradients so that they cannot undo the winners' progress (Diffusion-SDPO). A batch of B pairs is
stacked winners first: `(2B, *latent)`. It needs torch alone; triton is imported when it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

import seppo_fast._loss_arguments as arguments
from seppo_fast._loss_arguments import Backend
from seppo_fast.kernels.eager import LossForm

Flipper = Literal["adaptive", "indicator", "never"]

# `a` of the pairs that fail the anchor test, by flipper.
LEARN_SIGN: dict[str, float] = {"adaptive": -1.0, "indicator": 0.0, "never": 1.0}


@dataclass(frozen=True)
class PreferenceLoss:
    """What `preference_loss` returns: tensors on the device of the predictions, float32 but for `reject`.

    Only `loss` carries a gradient. Where a prediction is NaN, `loss`, `aaf_rate` and `implicit_acc` are NaN, and so is
    the pair's `logit`; its `reject` is False where D_w is NaN (a bool cannot say "unknown"), so mask with
    `logit.isnan()` before counting it.

    Attributes:
        loss: (), what is minimised: `preference_loss + sft_loss`.
        reject: (B,) bool, the anchor test D_w <= tie_tol, whatever the flipper.
        logit: (B,), -(beta/2) omega (D_w - a D_l).
        model_error: (2B,), the policy's mean squared errors, winners first.
        ref_error: (2B,), the reference's; where they were given, the very tensor.
        aaf_rate: (), mean of `reject`: the share of pairs on which the policy beats the reference on its anchor.
        implicit_acc: (), share of logits > 0 over all pairs. On learned pairs (not rejected) that is no preference
            accuracy.
        preference_loss: (), mean over the pairs of softplus(-logit).
        sft_loss: (), `sft_weight (beta/4)` times the mean of m_w over the pairs; 0 without.
    """

    loss: Tensor
    reject: Tensor
    logit: Tensor
    model_error: Tensor
    ref_error: Tensor
    aaf_rate: Tensor
    implicit_acc: Tensor
    preference_loss: Tensor
    sft_loss: Tensor


def preference_loss(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    *,
    ref_error: Tensor | None = None,
    beta: float = 2000.0,
    flipper: Flipper = "adaptive",
    tie_tol: float = 0.0,
    weights: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    backend: Backend = "auto",
) -> PreferenceLoss:
    """`mean softplus((beta/2) omega (D_w - a D_l))` (SePPO, eq. 8-10 and appendix B.2).

    Squared errors are taken in float32 whatever the dtype of the inputs (float64 is rounded to float32 first); their
    sums are rounded to float32 once. With `ref_pred`, D comes from the factored difference
    `mean((p - q)(p + q - 2y))`, far more exact than the difference of two means. Equal predictions give D exactly 0;
    with `ref_error` too, if that came from `denoising_errors` with the same backend, shapes, dtypes and memory format.
    A tie rejects (appendix B.2), so a batch of ties has loss ln 2.

    Gradients flow to `model_pred` alone. Any number of latent dims. Predictions are read in place in any dense memory
    format (channels_last) that they share, targets in any format whatever; what is not (gaps between the elements of a
    row) is copied first. Nothing syncs with the host. It can be differentiated once, in reverse mode, from inputs that
    have not changed since.

    Args:
        model_pred: (2B, *latent), float16, bfloat16, float32 or float64: the policy's predictions, winners first.
        target: (2B, *latent), or (B, *latent) when both halves share it: what the model is trained to predict.
        ref_pred: (2B, *latent), the reference's predictions on the same noised inputs. Either this or `ref_error`.
        ref_error: (2B,) float32, the reference's mean squared errors, made ahead of time by `denoising_errors`.
        beta: strength of the pull to the reference; multiplies a MEAN over the latent.
        flipper: `a` of the pairs whose winner the policy fits worse than the reference does: `adaptive` -1, `indicator`
            0, `never` +1 (plain Diffusion-DPO).
        tie_tol: |D_w| up to this counts as a tie.
        weights: (B,) float, omega of each pair: it multiplies the logit, not the loss.
        sft_weight: adds `sft_weight (beta/4) m_w` to each pair's loss, which omega does not multiply. At equal policy
            and reference the preference's own pull on m_w is beta/4, so 1 doubles it.
        safeguard: mu in [0, 1): multiplies the loser's gradient by `lambda = min((1 - mu) |g_w|^2 / s, 1)` where
            `s = a <g_l, g_w> > 0`, with `g = 2 (pred - target) / N` of each half (arXiv 2511.03317, Diffusion-SDPO's
            winner-preserving scale, in output space): the loser then takes back at most 1 - mu of what the winner's
            own gradient gains it, to first order. The loss keeps its value, and so is no longer the gradient's
            antiderivative. None: off.
        backend: `torch`; `triton`; or `auto`: triton for CUDA tensors where it is installed, else torch. CPU tensors go
            through triton only under its interpreter (TRITON_INTERPRET=1).

    Returns:
        The loss and its statistics.

    Raises:
        ValueError: an odd or empty batch, shapes or devices that differ, a dtype that is not one of the above, a
            `beta`, `tie_tol` or `sft_weight` that is negative or not finite, a `safeguard` outside [0, 1), an unknown
            flipper or backend, neither or both references.
    """
    form = _form(beta, flipper, tie_tol, sft_weight, safeguard)
    kernels, inputs = _inputs(model_pred, target, ref_pred, ref_error, weights, form, backend)
    return PreferenceLoss(*kernels.preference(*inputs))


def loss_and_grad(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    *,
    ref_error: Tensor | None = None,
    beta: float = 2000.0,
    flipper: Flipper = "adaptive",
    tie_tol: float = 0.0,
    weights: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
    grad_scale: float | Tensor = 1.0,
    overwrite: bool = False,
    backend: Backend = "auto",
) -> tuple[PreferenceLoss, Tensor]:
    """The loss of `preference_loss` and `grad_scale * dloss/dmodel_pred` at once, without autograd.

    With Triton that is one launch for latents of up to 16,384 elements, two for larger ones. In a trainer:

        result, grad = loss_and_grad(model_pred, target, ref_error=ref_error, grad_scale=1 / accumulation)
        model_pred.backward(grad)

    The other arguments are those of `preference_loss`.

    Args:
        grad_scale: multiplies the gradient before that is rounded to its dtype, and not the loss: a number, or a
            float32 tensor of one element on the device (a gradient scaler's factor, which so never visits the host;
            and in a compiled step a new value is no reason to compile anew).
        overwrite: whether the gradient is written over `model_pred`, which is gone then. Autograd is told: an operation
            that had kept `model_pred` for its own backward raises there. In a compiled step it is copied there.

    Returns:
        Loss and statistics, none of which carries a gradient, and the gradient: shape and dtype of `model_pred`, and
        its memory format.

    Raises:
        ValueError: as `preference_loss`; a `grad_scale` that is neither; `overwrite` where elements of `model_pred`
            share their memory.
    """
    form = _form(beta, flipper, tie_tol, sft_weight, safeguard)
    kernels, inputs = _inputs(model_pred, target, ref_pred, ref_error, weights, form, backend)
    arguments.check_scale("grad_scale", grad_scale, model_pred.device)
    if overwrite:
        arguments.check_writable("overwrite", model_pred)
    pred, *rest = inputs
    pred, order = pred.detach(), arguments.memory_order(model_pred)
    in_place = overwrite and arguments.rows_are_dense(model_pred, order)  # else `pred` is a copy
    scale = grad_scale if isinstance(grad_scale, Tensor) else float(grad_scale)
    outputs, grad = kernels.loss_and_grad(pred, *rest, scale, pred if in_place else None)
    result = PreferenceLoss(*outputs)
    if not overwrite:
        return result, arguments.from_rows(grad, model_pred, order)
    written = model_pred.detach()
    if not in_place:
        written.copy_(arguments.from_rows(grad, model_pred, order))
    elif not (torch.compiler.is_compiling() or model_pred.is_inference()):
        torch.autograd.graph.increment_version(model_pred)
    return result, written


def seppo_loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    beta: float = 2000.0,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
) -> PreferenceLoss:
    """SePPO's loss in place of the block of a Diffusion-DPO-style trainer (SePPO, appendix B.2).

    Args:
        model_pred: (2B, *latent), the policy's predictions, winners first.
        ref_pred: (2B, *latent), the reference's predictions on the same noised inputs.
        target: (2B, *latent), or (B, *latent) when both halves share it.
        beta: as in `preference_loss`, which says the rest.
        sft_weight: alike.
        safeguard: alike.
    """
    return preference_loss(model_pred, target, ref_pred, beta=beta, sft_weight=sft_weight, safeguard=safeguard)


def dpo_loss(
    model_pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    beta: float = 2000.0,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
) -> PreferenceLoss:
    """Diffusion-DPO's loss (arXiv 2311.12908, eq. 14), with the arguments of `seppo_loss`; losers are labelled."""
    options: dict[str, Any] = {"beta": beta, "sft_weight": sft_weight, "safeguard": safeguard, "flipper": "never"}
    return preference_loss(model_pred, target, ref_pred, **options)


def denoising_errors(pred: Tensor, target: Tensor, backend: Backend = "auto") -> Tensor:
    """`m = mean (pred - target)^2` of each sample, reduced exactly as `preference_loss` reduces it.

    Errors of a frozen reference made by this function may be kept and passed as `ref_error`: where policy and reference
    predict the same bits, D is then exactly 0 (same backend, number of rows, dtypes and memory format). It is
    differentiable in `pred`: its mean over winners is the loss of plain fine-tuning.

    Args:
        pred: (rows, *latent), float16, bfloat16, float32 or float64.
        target: (rows, *latent), or (rows / 2, *latent) when both halves share it.
        backend: as in `preference_loss`.

    Returns:
        (rows,) float32.

    Raises:
        ValueError: no rows, shapes or devices that differ, a dtype that is not one of the above, an unknown backend.
    """
    arguments.check_prediction("pred", pred)
    arguments.check_target(target, "pred", pred)
    kernels = arguments.kernels_for(backend, pred.device)
    order = arguments.memory_order(pred)
    return kernels.denoising_errors(arguments.rows(pred, order), arguments.ordered(target.detach(), order))


def _inputs(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    weights: Tensor | None,
    form: LossForm,
    backend: str,
) -> tuple[ModuleType, tuple[Any, ...]]:
    """Checks the tensors once; the kernels to use and their arguments."""
    arguments.check_prediction("model_pred", model_pred)
    arguments.check_pairs("model_pred", model_pred)
    arguments.check_target(target, "model_pred", model_pred)
    arguments.check_reference(ref_pred, ref_error, model_pred)
    if weights is not None:
        arguments.check_vector("weights", weights, len(model_pred) // 2, arguments.DTYPES, model_pred.device)
        weights = weights.detach().float().contiguous()
    kernels = arguments.kernels_for(backend, model_pred.device)
    order = arguments.memory_order(model_pred)
    return kernels, (
        arguments.rows(model_pred, order),
        arguments.ordered(target.detach(), order),
        None if ref_pred is None else arguments.rows(ref_pred.detach(), order),
        None if ref_error is None else ref_error.detach().contiguous(),
        weights,
        form,
    )


def _form(beta: float, flipper: str, tie_tol: float, sft_weight: float, safeguard: float | None) -> LossForm:
    """Checks the numbers once."""
    for name, value in {"beta": beta, "tie_tol": tie_tol, "sft_weight": sft_weight}.items():
        arguments.check_number(name, value)
    if flipper not in tuple(LEARN_SIGN):
        raise ValueError(f"flipper: {flipper!r} is unknown, use one of {', '.join(LEARN_SIGN)}")
    if safeguard is not None:
        arguments.check_share("safeguard", safeguard)
        safeguard = float(safeguard)
    return LossForm(float(beta), LEARN_SIGN[flipper], float(tie_tol), float(sft_weight), safeguard)
