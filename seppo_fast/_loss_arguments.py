"""What the loss accepts: its checks, the kernels for a device, and latents as rows in the order of their memory."""

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
OLDEST_GPU = 8  # compute capability: Ampere, the first with bfloat16

_FLOAT32_MAX = torch.finfo(torch.float32).max
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def memory_order(pred: Tensor) -> list[int]:
    """The dims of `pred`, rows first, the others from the farthest apart in memory to the nearest."""
    order = [0]
    for dim in range(1, pred.ndim):  # `sorted` takes no strides that torch.compile keeps open
        place = len(order)
        while place > 1 and pred.stride(order[place - 1]) < pred.stride(dim):
            place -= 1
        order.insert(place, dim)
    return order


def ordered(x: Tensor, order: list[int]) -> Tensor:
    """(rows, *dims) in this order: a view."""
    return x if order == sorted(order) else x.permute(order)


def rows(x: Tensor, order: list[int]) -> Tensor:
    """(rows, N) in this order: a view where the elements of each row lie side by side in it, else a copy."""
    flat = ordered(x, order).flatten(1)
    # Slices with gaps and expanded latents can flatten to a view with another step than 1.
    return flat if flat.stride(1) == 1 else flat.contiguous()


def from_rows(x: Tensor, pred: Tensor, order: list[int]) -> Tensor:
    """The way back from `rows`: a dense (rows, N) in the shape of `pred`; a view."""
    if order == sorted(order):
        return x.view(pred.shape)
    return x.view([pred.shape[dim] for dim in order]).permute([order.index(dim) for dim in range(pred.ndim)])


def rows_are_dense(pred: Tensor, order: list[int]) -> bool:
    """Whether the elements of each row lie side by side, so that `rows` is a view of `pred`."""
    step = 1
    for dim in reversed(order[1:]):
        if pred.shape[dim] != 1 and pred.stride(dim) != step:
            return False
        step *= pred.shape[dim]
    return True


def kernels_for(backend: str, device: torch.device) -> ModuleType:
    """`kernels/preference.py`, its twin `eager.py` or, in a step that is compiled, its `operators.py`: same functions.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the device; says which can.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown, use one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return eager
    obstacle = _obstacle(device)
    if obstacle:
        if backend == "auto":
            return eager
        raise ValueError(f"backend: 'triton' needs {obstacle}; use 'torch', or 'auto', which takes what can run")
    if torch.compiler.is_compiling():
        import seppo_fast.kernels.torch_ops as operators

        return operators
    import seppo_fast.kernels.preference as preference

    return preference


def _obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on the device."""
    if not _HAS_TRITON:
        return "triton, which is not installed (pip install 'triton>=3.6')"
    if device.type == "cuda":
        # "cuda" is the current one, which may change; and torch.compile traces a cached function, but warns of it.
        kept = device.index is not None and not torch.compiler.is_compiling()
        return _kept_gpu_obstacle(device) if kept else _gpu_obstacle(device)
    import seppo_fast.kernels.denoising_error as errors

    if errors.INTERPRETED:
        return None
    return (
        f"CUDA tensors, got {device.type} (there only under triton's interpreter, with TRITON_INTERPRET=1 set before "
        "the process starts)"
    )


def _gpu_obstacle(device: torch.device) -> str | None:
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major >= OLDEST_GPU:
        return None
    return f"a GPU of compute capability {OLDEST_GPU}.0 or newer, got {gpu.major}.{gpu.minor} ({gpu.name})"


_kept_gpu_obstacle = cache(_gpu_obstacle)


def check_tensor(name: str, x: object) -> None:
    """A dense tensor, whatever it holds."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        what = f"a tensor of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: a dense torch tensor is needed, got {what}")


def check_prediction(name: str, pred: Tensor) -> None:
    """A batch of latents, nowhere empty, of a dtype that the kernels read."""
    check_tensor(name, pred)
    if pred.ndim < 2 or pred.numel() == 0:
        raise ValueError(f"{name}: a batch (rows, *latent), nowhere empty, is needed, got {_shape(pred)}")
    _check_dtype(name, pred, DTYPES)


def check_pairs(name: str, pred: Tensor) -> None:
    """Two rows a pair."""
    if len(pred) % 2:
        raise ValueError(f"{name}: an even number of rows (2B, winners first) is needed, got {len(pred)}")


def check_target(target: Tensor, name: str, pred: Tensor) -> None:
    """Rows as `pred`, or half of them, on its device."""
    check_tensor("target", target)
    rows, latent = len(pred), pred.shape[1:]
    shared = rows % 2 == 0 and target.shape == (rows // 2, *latent)
    if target.shape != pred.shape and not shared:
        raise ValueError(f"target: {_shape(pred)} as {name}, or half its rows, is needed, got {_shape(target)}")
    _check_dtype("target", target, DTYPES)
    _check_device("target", target, pred.device)


def check_reference(ref_pred: Tensor | None, ref_error: Tensor | None, model_pred: Tensor) -> None:
    """Exactly one of the two, of the shape and on the device of `model_pred`."""
    if (ref_pred is None) == (ref_error is None):
        given = "neither" if ref_pred is None else "both"
        raise ValueError(f"ref_pred, ref_error: exactly one of them is needed, got {given}")
    if ref_pred is not None:
        check_tensor("ref_pred", ref_pred)
        if ref_pred.shape != model_pred.shape:
            raise ValueError(f"ref_pred: {_shape(model_pred)} as model_pred is needed, got {_shape(ref_pred)}")
        _check_dtype("ref_pred", ref_pred, DTYPES)
        _check_device("ref_pred", ref_pred, model_pred.device)
    if ref_error is not None:
        # Half-precision reference errors are what turns the anchor test into a coin flip.
        check_vector("ref_error", ref_error, len(model_pred), (torch.float32,), model_pred.device)


def check_vector(name: str, x: Tensor, rows: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """One number a row."""
    check_tensor(name, x)
    if x.shape != (rows,):
        raise ValueError(f"{name}: shape ({rows},) is needed, got {_shape(x)}")
    _check_dtype(name, x, dtypes)
    _check_device(name, x, device)


def _check_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: dtype {allowed} is needed, got {str(x.dtype).removeprefix('torch.')}")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: the device of the predictions, {device}, is needed, got {x.device}")


def check_number(name: str, value: object) -> None:
    """A finite number that is not negative."""
    # A tensor is refused because reading it would wait for the device.
    if not _within(value, 0.0):
        raise ValueError(f"{name}: a finite number >= 0 is needed, got {value!r}")


def check_share(name: str, value: object) -> None:
    """A number in [0, 1)."""
    if not (_within(value, 0.0) and float(value) < 1):  # type: ignore[arg-type]
        raise ValueError(f"{name}: a number in [0, 1) is needed, got {value!r}")


def _within(value: object, least: float) -> bool:
    """Whether it is a number, Python's or numpy's, from `least` to the largest float32."""
    try:
        return isinstance(value, Real) and least <= float(value) <= _FLOAT32_MAX
    except OverflowError:  # of an int beyond all floats
        return False


def check_scale(name: str, value: object, device: torch.device) -> None:
    """A finite number, or a float32 tensor of one element on the device."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype != torch.float32:
            what = f"{str(value.dtype).removeprefix('torch.')} {_shape(value)}"
            raise ValueError(f"{name}: a number or a float32 tensor of one element is needed, got {what}")
        _check_device(name, value, device)
    elif not _within(value, -_FLOAT32_MAX):
        raise ValueError(f"{name}: a finite number or a float32 tensor of one element is needed, got {value!r}")


def check_writable(name: str, pred: Tensor) -> None:
    """No two elements in one place, as far as strides alone tell."""
    reach = 0
    for stride, size in sorted(zip(pred.stride(), pred.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name}: elements of model_pred share their memory (expanded?), so it is not written")
        reach += (size - 1) * stride


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
