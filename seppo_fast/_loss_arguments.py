"""Argument handling of the loss: checks, the choice of kernels, and latents as rows in the order of their memory."""

from __future__ import annotations

import importlib.util
from functools import cache
from numbers import Real
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

import seppo_fast.kernels.eager as eager

Backend = Literal["auto", "triton", "torch"]
BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLDEST_GPU = 8  # major compute capability: Ampere, the first with bfloat16

_FLOAT32_MAX = torch.finfo(torch.float32).max
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def memory_order(pred: Tensor) -> list[int]:
    """Returns the dims of `pred`: rows first, then the others from the largest stride to the smallest."""
    order = [0]
    for dim in range(1, pred.ndim):  # not `sorted`, which cannot compare torch.compile's symbolic strides
        place = len(order)
        while place > 1 and pred.stride(order[place - 1]) < pred.stride(dim):
            place -= 1
        order.insert(place, dim)
    return order


def ordered(x: Tensor, order: list[int]) -> Tensor:
    """Returns a view of `x` with its dims in this order, rows first."""
    return x if order == sorted(order) else x.permute(order)


def rows(x: Tensor, order: list[int]) -> Tensor:
    """Returns `x` as (rows, N) with its dims in this order: a view if each row is contiguous in it, else a copy."""
    flat = ordered(x, order).flatten(1)
    # Slices with gaps and expanded latents can flatten to a view whose stride is not 1.
    return flat if flat.stride(1) == 1 else flat.contiguous()


def from_rows(x: Tensor, pred: Tensor, order: list[int]) -> Tensor:
    """Inverts `rows`: returns a view of a dense (rows, N) tensor in the shape of `pred`."""
    if order == sorted(order):
        return x.view(pred.shape)
    return x.view([pred.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(pred.ndim)])


def rows_are_dense(pred: Tensor, order: list[int]) -> bool:
    """Returns whether each row is contiguous in this order, so that `rows` is a view of `pred`."""
    step = 1
    for dim in reversed(order[1:]):
        if pred.shape[dim] != 1 and pred.stride(dim) != step:
            return False
        step *= pred.shape[dim]
    return True


def kernels_for(backend: str, device: torch.device) -> ModuleType:
    """Returns the module whose kernels to use; all of them have the same functions.

    These are `kernels/preference.py`, its PyTorch twin `eager.py` and, inside torch.compile, `torch_ops.py`.

    Raises:
        ValueError: The backend is unknown or cannot run on the device. The message says which one can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown, use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return eager
    obstacle = _obstacle(device)
    if obstacle:
        if backend == "auto":
            return eager
        raise ValueError(f"backend: 'triton' needs {obstacle}; use 'torch', or 'auto', which picks what can run")
    if torch.compiler.is_compiling():
        import seppo_fast.kernels.torch_ops as operators

        return operators
    import seppo_fast.kernels.preference as preference

    return preference


def _obstacle(device: torch.device) -> str | None:
    """Returns what Triton needs and this device or installation lacks; None if Triton can run."""
    if not _HAS_TRITON:
        return "the package triton, which is not installed (pip install 'triton>=3.6')"
    if device.type == "cuda":
        # Not cached for plain "cuda", the current device, which can change; nor inside torch.compile, which traces a
        # cached function but warns about it.
        kept = device.index is not None and not torch.compiler.is_compiling()
        return _kept_gpu_obstacle(device) if kept else _gpu_obstacle(device)
    import seppo_fast.kernels.denoising_error as errors

    if errors.INTERPRETED:
        return None
    return (
        f"CUDA tensors, got {device.type} (supported only by triton's interpreter, with TRITON_INTERPRET=1 set before "
        "the process starts)"
    )


def _gpu_obstacle(device: torch.device) -> str | None:
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major >= OLDEST_GPU:
        return None
    return f"a GPU of compute capability {OLDEST_GPU}.0 or newer, got {gpu.major}.{gpu.minor} ({gpu.name})"


_kept_gpu_obstacle = cache(_gpu_obstacle)


def check_tensor(name: str, x: object) -> None:
    """Raises ValueError unless `x` is a dense tensor."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        what = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a dense torch tensor, got {what}")


def check_prediction(name: str, pred: Tensor) -> None:
    """Raises ValueError unless `pred` is a non-empty batch of latents of a supported dtype."""
    check_tensor(name, pred)
    if pred.ndim < 2 or pred.numel() == 0:
        raise ValueError(f"{name}: expected a non-empty batch (rows, *latent), got shape {_shape(pred)}")
    _check_dtype(name, pred, DTYPES)


def check_pairs(name: str, pred: Tensor) -> None:
    """Raises ValueError unless `pred` has two rows per pair."""
    if len(pred) % 2:
        raise ValueError(f"{name}: expected an even number of rows (2B, winners first), got {len(pred)}")


def check_target(target: Tensor, name: str, pred: Tensor) -> None:
    """Raises ValueError unless `target` has as many rows as `pred`, or half as many, and is on its device."""
    check_tensor("target", target)
    rows, latent = len(pred), pred.shape[1:]
    shared = rows % 2 == 0 and target.shape == (rows // 2, *latent)
    if target.shape != pred.shape and not shared:
        raise ValueError(
            f"target: expected the shape of {name}, {_shape(pred)}, or half as many rows, got {_shape(target)}"
        )
    _check_dtype("target", target, DTYPES)
    _check_device("target", target, pred.device)


def check_reference(ref_pred: Tensor | None, ref_error: Tensor | None, model_pred: Tensor) -> None:
    """Raises ValueError unless exactly one of the two is given and fits `model_pred` in shape and device."""
    if (ref_pred is None) == (ref_error is None):
        given = "neither" if ref_pred is None else "both"
        raise ValueError(f"ref_pred, ref_error: expected exactly one of them, got {given}")
    if ref_pred is not None:
        check_tensor("ref_pred", ref_pred)
        if ref_pred.shape != model_pred.shape:
            raise ValueError(
                f"ref_pred: expected the shape of model_pred, {_shape(model_pred)}, got {_shape(ref_pred)}"
            )
        _check_dtype("ref_pred", ref_pred, DTYPES)
        _check_device("ref_pred", ref_pred, model_pred.device)
    if ref_error is not None:
        # float32 only: reference errors rounded to half precision turn the anchor test into a coin flip.
        check_vector("ref_error", ref_error, len(model_pred), (torch.float32,), model_pred.device)


def check_vector(name: str, x: Tensor, rows: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Raises ValueError unless `x` holds one number per row."""
    check_tensor(name, x)
    if x.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), got {_shape(x)}")
    _check_dtype(name, x, dtypes)
    _check_device(name, x, device)


def _check_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected dtype {allowed}, got {str(x.dtype).removeprefix('torch.')}")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: expected the device of the predictions, {device}, got {x.device}")


def check_number(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a finite number >= 0."""
    # A tensor is refused because reading it would wait for the device.
    if not _within(value, 0.0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a number in [0, 1)."""
    if not (_within(value, 0.0) and float(value) < 1):  # type: ignore[arg-type]
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")


def _within(value: object, least: float) -> bool:
    """Returns whether `value` is a number, of Python or NumPy, from `least` to the largest float32."""
    try:
        return isinstance(value, Real) and least <= float(value) <= _FLOAT32_MAX
    except OverflowError:  # an int too large for any float
        return False


def check_scale(name: str, value: object, device: torch.device) -> None:
    """Raises ValueError unless `value` is a finite number, or a float32 tensor with one element on the device."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype != torch.float32:
            what = f"{str(value.dtype).removeprefix('torch.')} {_shape(value)}"
            raise ValueError(f"{name}: expected a number or a float32 tensor with one element, got {what}")
        _check_device(name, value, device)
    elif not _within(value, -_FLOAT32_MAX):
        raise ValueError(f"{name}: expected a finite number or a float32 tensor with one element, got {value!r}")


def check_writable(name: str, pred: Tensor) -> None:
    """Raises ValueError if elements of `pred` share memory, as far as strides alone can show that."""
    reach = 0
    for stride, size in sorted(zip(pred.stride(), pred.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"{name}: elements of model_pred share memory (is it expanded?), so it cannot be overwritten"
            )
        reach += (size - 1) * stride


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
