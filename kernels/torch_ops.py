"""The kernels as torch.library operators, for compiled steps: torch.compile does not look inside a Triton kernel.

Eager code bypasses these operators, because their dispatch takes longer than the kernels run. The functions are the
same as in `preference.py` and in `eager.py`, the PyTorch twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import seppo_fast.kernels.denoising_error as errors
import seppo_fast.kernels.preference as kernels
from seppo_fast.kernels.eager import LossForm, PreferenceTensors


@torch.library.custom_op("seppo_fast::denoising_errors", mutates_args=())
def _denoising_errors(pred: Tensor, target: Tensor) -> Tensor:
    return errors.denoising_errors(pred, target)


@_denoising_errors.register_fake
def _(pred: Tensor, target: Tensor) -> Tensor:
    return pred.new_empty(pred.shape[0], dtype=torch.float32)


@torch.library.custom_op("seppo_fast::scaled_residual", mutates_args=())
def _scaled_residual(
    pred: Tensor, target: Tensor, coefficient: Tensor, factor: float, factor_tensor: Tensor | None
) -> Tensor:
    scale = factor if factor_tensor is None else factor_tensor
    return errors.write_gradient(pred, target, coefficient, scale, errors.dense_like(pred))


@_scaled_residual.register_fake
def _(pred: Tensor, *_: Any) -> Tensor:
    return errors.dense_like(pred)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _errors_backward(ctx: Any, grad_error: Tensor) -> tuple[Tensor, None]:
    pred, target = ctx.saved_tensors
    return _scaled_residual(pred, target, grad_error.contiguous(), 2 / pred.shape[1], None), None


_denoising_errors.register_autograd(_errors_backward, setup_context=_save_inputs)


@torch.library.custom_op("seppo_fast::preference", mutates_args=())
def _preference(
    pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    weights: Tensor | None,
    beta: float,
    learn_sign: float,
    tie_tol: float,
    sft_weight: float,
    safeguard: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    form = LossForm(beta, learn_sign, tie_tol, sft_weight, safeguard)
    return kernels.forward(pred, target, ref_pred, ref_error, weights, form, own_ticket=True)


@_preference.register_fake
def _fake(pred: Tensor, target: Tensor, ref_pred: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    pairs = pred.shape[0] // 2
    statistics = pred.new_empty(kernels.statistics_size(pairs, ref_pred is not None), dtype=torch.float32)
    return pred.new_empty((), dtype=torch.float32), pred.new_empty(pairs, dtype=torch.bool), statistics


def _save_coefficients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[2])


def _preference_backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    pred, target, statistics = ctx.saved_tensors
    coefficient = kernels.coefficients(statistics, pred.shape[0] // 2)
    return _scaled_residual(pred, target, coefficient, 1.0, grad_loss), *[None] * 9


_preference.register_autograd(_preference_backward, setup_context=_save_coefficients)


@torch.library.custom_op("seppo_fast::loss_and_grad", mutates_args=())
def _loss_and_grad(
    pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None,
    ref_error: Tensor | None,
    weights: Tensor | None,
    beta: float,
    learn_sign: float,
    tie_tol: float,
    sft_weight: float,
    safeguard: float | None,
    grad_scale: float,
    scale_tensor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = errors.dense_like(pred)
    form = LossForm(beta, learn_sign, tie_tol, sft_weight, safeguard)
    scale = grad_scale if scale_tensor is None else scale_tensor
    return *kernels.forward(pred, target, ref_pred, ref_error, weights, form, scale, grad, own_ticket=True), grad


@_loss_and_grad.register_fake
def _(pred: Tensor, target: Tensor, ref_pred: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake(pred, target, ref_pred), errors.dense_like(pred)


def denoising_errors(pred_RN: Tensor, target: Tensor) -> Tensor:
    """Computes denoising errors; see `denoising_error.denoising_errors`."""
    return _denoising_errors(pred_RN, target)


def preference(*inputs: Any) -> PreferenceTensors:
    """Computes the loss, with the arguments of `preference.preference`."""
    *tensors, form = inputs
    return kernels.named(*_preference(*tensors, *form), ref_error=inputs[3])


def loss_and_grad(*inputs: Any) -> tuple[PreferenceTensors, Tensor]:
    """Computes loss and gradient, with the arguments of `preference.loss_and_grad`."""
    *tensors, form, grad_scale, grad_RN = inputs
    scale = (1.0, grad_scale) if isinstance(grad_scale, Tensor) else (grad_scale, None)
    loss, reject, statistics, grad = _loss_and_grad(*tensors, *form, *scale)
    named = kernels.named(loss, reject, statistics, ref_error=inputs[3])
    return named, grad if grad_RN is None else grad_RN.copy_(grad)
