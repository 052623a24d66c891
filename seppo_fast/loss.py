"""The preference losses of SePPO and Diffusion-DPO for any trainer: they turn predictions into loss and statistics.

A pair has a winner (subscript w) and a loser (l). For each of them, m is the policy's mean squared error over the
latent, r is the reference's, and D = m - r:

    a = +1 where D_w <= 0 ("reject"), else -1        logit = -(beta/2) omega (D_w - a D_l)
    loss = mean softplus(-logit)

(SePPO, arXiv 2410.05255, eq. 8-10 and appendix B.2; with a = +1 for all pairs it is Diffusion-DPO.) Two options are
not in the paper and off by default: `sft_weight` adds plain fine-tuning on the winners, and `safeguard` scales the
losers' gradients so that they cannot undo the winners' progress (Diffusion-SDPO).

A batch of B pairs is stacked winners first: `(2B, *latent)`. The module needs only PyTorch; Triton is imported when a
call uses it.
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

# By flipper, the value of `a` for pairs that fail the anchor test.
LEARN_SIGN: dict[str, float] = {"adaptive": -1.0, "indicator": 0.0, "never": 1.0}


@dataclass(frozen=True)
class PreferenceLoss:
    """The result of `preference_loss` and `loss_and_grad`: float32 tensors (`reject` is bool) on the inputs' device.

    Only `loss` carries a gradient. If a prediction contains NaN, the logit of its pair is NaN, and so are `loss`,
    `aaf_rate` and `implicit_acc`. If D_w is NaN, `reject` is False, since a bool cannot say "unknown": mask it with
    `logit.isnan()` before you count it.

    Attributes:
        loss: (), the value to minimise: `preference_loss + sft_loss`.
        reject: (B,) bool, the anchor test D_w <= tie_tol: True where the policy fits the winner at least as well as the
            reference does. It does not depend on the flipper.
        logit: (B,), -(beta/2) omega (D_w - a D_l).
        model_error: (2B,), the policy's mean squared errors, winners first.
        ref_error: (2B,), the reference's mean squared errors. If the caller passed them, this is the same tensor.
        aaf_rate: (), the mean of `reject`: the share of pairs whose winner the policy fits at least as well as the
            reference.
        implicit_acc: (), the share of pairs with logit > 0. For pairs that are not rejected this is not a preference
            accuracy, unless the flipper is `never`: their loser counts with the opposite sign, or not at all.
        preference_loss: (), the mean of softplus(-logit) over the pairs.
        sft_loss: (), `sft_weight (beta/4)` times the mean of m_w over the pairs; 0 if `sft_weight` is 0.
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
    """Computes `mean softplus((beta/2) omega (D_w - a D_l))` (SePPO, eq. 8-10 and appendix B.2).

    Errors are squared in float32 whatever the inputs' dtype (float64 inputs are rounded to float32 first). Their sums
    are rounded to float32 once. With `ref_pred`, D is computed as the factored difference `mean((p - q)(p + q - 2y))`
    of policy p, reference q and target y, which is far more exact than the difference of two means. Equal predictions
    give D = 0 exactly. With `ref_error` they do so too, if it comes from `denoising_errors` with the same backend,
    shapes, dtypes and memory format. A tie rejects (appendix B.2), so a batch of equal predictions has a loss of ln 2.

    Only `model_pred` receives a gradient. Latents can have any number of dims. Predictions are read in place in any
    dense memory format (such as channels_last) that both share, and targets in nearly any format; other inputs, such as
    a prediction with gaps between the elements of a row, are copied first. Nothing synchronizes with the host.

    Only first derivatives in reverse mode are supported. Do not modify the inputs in place before the backward.

    Args:
        model_pred: the policy's predictions, winners first: (2B, *latent) float16, bfloat16, float32 or float64.
        target: the values that the model is trained to predict: (2B, *latent), or (B, *latent) if both halves share
            them.
        ref_pred: the reference's predictions on the same noised inputs: (2B, *latent). Pass this or `ref_error`.
        ref_error: the reference's mean squared errors, computed earlier by `denoising_errors`: (2B,) float32.
        beta: the strength of the pull towards the reference. It multiplies a MEAN over the latent, not a sum.
        flipper: the value of `a` for pairs whose winner the policy fits worse than the reference does: `adaptive` -1,
            `indicator` 0, `never` +1 (plain Diffusion-DPO).
        tie_tol: the largest |D_w| that counts as a tie.
        weights: omega, one factor per pair: (B,), of any of the float dtypes above. It multiplies the logit, not the
            loss.
        sft_weight: the weight of plain fine-tuning: adds `sft_weight (beta/4) m_w` to each pair's loss, unaffected by
            omega. Where policy and reference agree, the preference itself pulls on m_w with beta/4, so 1 doubles that.
        safeguard: mu in [0, 1), or None to turn it off. It multiplies the loser's gradient by
            `lambda = min((1 - mu) |g_w|^2 / s, 1)` where `s = a <g_l, g_w> > 0`, with `g = 2 (pred - target) / N` of
            each half (the winner-preserving scale of Diffusion-SDPO, arXiv 2511.03317, in output space). To first
            order the loser then takes back at most the share 1 - mu of what the winner's own gradient gains the winner.
            The loss keeps its value, so the gradient is no longer the derivative of the loss.
        backend: `torch`, `triton` or `auto`. `auto` uses Triton for CUDA tensors if Triton is installed and the GPU
            has compute capability 8.0 or newer, else PyTorch. Triton supports CPU tensors only in its interpreter
            (TRITON_INTERPRET=1).

    Returns:
        The loss and its statistics.

    Raises:
        ValueError: The batch is empty or odd; shapes or devices differ; a dtype is not supported; `beta`, `tie_tol` or
            `sft_weight` is negative or not finite; `safeguard` is outside [0, 1); the flipper or backend is unknown;
            the backend cannot run here; both or neither of `ref_pred` and `ref_error` are given.
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
    """Computes the loss of `preference_loss` and `grad_scale * dloss/dmodel_pred` in one call, without autograd.

    With Triton this is one kernel launch for latents of up to 16,384 elements, and two for larger ones. In a trainer:

        result, grad = loss_and_grad(model_pred, target, ref_error=ref_error, grad_scale=1 / accumulation)
        model_pred.backward(grad)

    See `preference_loss` for the arguments that are not listed here.

    Args:
        grad_scale: a factor on the gradient, not on the loss, applied before the gradient is rounded to its dtype: a
            number, or a float32 tensor with one element on the predictions' device. A tensor, such as a gradient
            scaler's factor, is never read on the host, and a new value does not recompile a compiled step.
        overwrite: whether to write the gradient into the memory of `model_pred`, whose values are then lost. If an
            operation saved `model_pred` for its own backward, that backward raises. In a compiled step the gradient is
            made elsewhere and copied there.

    Returns:
        The loss and its statistics, none of which carries a gradient, and the gradient in the shape, dtype and memory
        format of `model_pred`.

    Raises:
        ValueError: As for `preference_loss`; `grad_scale` is neither of the above; `overwrite` is set and elements of
            `model_pred` share memory.
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
    """Computes SePPO's loss; replaces the loss block of a Diffusion-DPO-style trainer (SePPO, appendix B.2).

    The reference's predictions are the second argument here, as in those trainers; in `preference_loss` they are the
    third. See there for dtypes, gradients and errors.

    Args:
        model_pred: the policy's predictions, winners first: (2B, *latent).
        ref_pred: the reference's predictions on the same noised inputs: (2B, *latent).
        target: the values that the model is trained to predict: (2B, *latent), or (B, *latent) if both halves share
            them.
        beta: the strength of the pull towards the reference; see `preference_loss`.
        sft_weight: the weight of plain fine-tuning on the winners; see `preference_loss`.
        safeguard: mu in [0, 1) or None; see `preference_loss`.
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
    """Computes Diffusion-DPO's loss (arXiv 2311.12908, eq. 14), for pairs with labelled losers.

    The arguments are those of `seppo_loss`.
    """
    options: dict[str, Any] = {"beta": beta, "sft_weight": sft_weight, "safeguard": safeguard, "flipper": "never"}
    return preference_loss(model_pred, target, ref_pred, **options)


def denoising_errors(pred: Tensor, target: Tensor, backend: Backend = "auto") -> Tensor:
    """Computes the mean squared error `m = mean (pred - target)^2` of each sample, exactly as `preference_loss` does.

    Use it to compute the errors of a frozen reference once and pass them as `ref_error`. Where policy and reference
    predict the same bits, D is then exactly 0, if backend, number of rows, dtypes and memory format are the same.

    The result is differentiable in `pred`: its mean over the winners is the loss of plain fine-tuning.

    Args:
        pred: the predictions: (rows, *latent) float16, bfloat16, float32 or float64.
        target: the values to predict: (rows, *latent), or (rows / 2, *latent) if both halves share them.
        backend: `torch`, `triton` or `auto`; see `preference_loss`.

    Returns:
        The errors: (rows,) float32.

    Raises:
        ValueError: `pred` is empty; shapes or devices differ; a dtype is not supported; the backend is unknown or
            cannot run here.
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
    """Checks the tensors; returns the module of kernels to use and the arguments of its functions."""
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
    """Checks the options and returns them as the kernels read them."""
    for name, value in {"beta": beta, "tie_tol": tie_tol, "sft_weight": sft_weight}.items():
        arguments.check_number(name, value)
    if flipper not in tuple(LEARN_SIGN):
        raise ValueError(f"flipper: {flipper!r} is unknown, use one of {', '.join(LEARN_SIGN)}")
    if safeguard is not None:
        arguments.check_share("safeguard", safeguard)
        safeguard = float(safeguard)
    return LossForm(float(beta), LEARN_SIGN[flipper], float(tie_tol), float(sft_weight), safeguard)
