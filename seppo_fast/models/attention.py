"""The choice of attention backend for a UNet: PyTorch's own (SDPA) or xformers, the same for policy and reference.

Both compute exact attention with fused kernels, but round differently. Which is faster depends on GPU, shapes and
versions, so `auto` times them on the model's own attention layers.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seppo_fast.config.vocabulary import Attention as Backend
from seppo_fast.config.vocabulary import AttentionChoice
from seppo_fast.models.fake import UNet, fake_copy
from seppo_fast.utils.errors import ConfigError

Call = Callable[[nn.Module, int], Any]
"""(network, rows) -> the network's output; the function makes inputs with that many rows and runs the network."""
Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]

# Fused kernels fail where rows x heads, one side of their grid, reaches this (xformers#845, pytorch#142228).
GRID_LIMIT = 65_536

_PROCESSORS: dict[Backend, type] = {"sdpa": AttnProcessor2_0, "xformers": XFormersAttnProcessor}

# The largest relative RMS difference between two correct kernels: a few roundings of the dtype (of TF32 for float32).
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class ChunkedAttention:
    """A diffusers attention processor that splits large batches into chunks that fused kernels can handle.

    Each row attends only to itself, so splitting the batch by rows does not change the result.

    Args:
        processor: the processor that computes each chunk.
        limit: an upper bound: rows times heads of each chunk stay below it.
    """

    def __init__(self, processor: Callable[..., Tensor], limit: int = GRID_LIMIT) -> None:
        self._processor = processor
        self._limit = limit

    # `Attention` passes only arguments that its processor's signature names, so this repeats the inner signature.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        rows = len(hidden_states)
        inputs = (hidden_states, encoder_hidden_states, attention_mask, temb)
        if rows * attn.heads < self._limit:
            return self._processor(attn, *inputs, *args, **kwargs)
        size = max(1, (self._limit - 1) // attn.heads)
        chunks = -(-rows // size)
        # A mask may have one row per batch row, or one per batch row and head.
        split = [[None] * chunks if x is None else x.split(size * (len(x) // rows)) for x in inputs]
        return torch.cat([self._processor(attn, *chunk, *args, **kwargs) for chunk in zip(*split, strict=True)])


@dataclass(frozen=True)
class AttentionShape:
    """The shapes of one call of an attention layer.

    Attributes:
        hidden: the shape of the queries' input: (rows, tokens, channels), or (rows, channels, height, width).
        context: the shape of the keys' and values' input, (rows, L, D); None for self-attention.
        heads: the number of heads.
        head_dim: the width of one head.
    """

    hidden: tuple[int, ...]
    context: tuple[int, ...] | None
    heads: int
    head_dim: int

    def __str__(self) -> str:
        queries = self.hidden[1] if len(self.hidden) == 3 else self.hidden[2] * self.hidden[3]
        keys = queries if self.context is None else self.context[1]
        return f"{self.hidden[0]} rows, {queries} queries, {keys} keys, {self.heads} heads of {self.head_dim}"


def set_attention(unet: UNet, backend: Backend) -> None:
    """Sets the attention backend of a UNet, with or without a LoRA. Batches too large for its kernels are split.

    Raises:
        ValueError: The backend is unknown, or the UNet has an attention processor other than the plain ones.
        ConfigError: xformers is not installed.
    """
    if backend not in _PROCESSORS:
        raise ValueError(f"backend: {backend!r} is unknown, use one of {', '.join(_PROCESSORS)}")
    plain = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, ChunkedAttention)
    for name, processor in unet.attn_processors.items():
        if type(processor) not in plain:
            raise ValueError(f"unet: {name} is a {type(processor).__name__}; only plain attention can be replaced")
    if backend == "xformers":
        _require_installed()
    unet.set_attn_processor(_processor(backend))


def interleaved_milliseconds(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """Returns the median time of each function on the current CUDA device, in milliseconds.

    The functions take turns, so that all of them see the same clock rate.
    """
    warm_up, repeats = 3, 11
    events = []
    for turn in range(warm_up + repeats):
        for index, function in enumerate(functions):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            if turn >= warm_up:
                events.append((index, start, end))
    torch.cuda.synchronize()
    times = [[start.elapsed_time(end) for at, start, end in events if at == index] for index in range(len(functions))]
    return [statistics.median(taken) for taken in times]


def choose_attention(
    wanted: AttentionChoice,
    unet: UNet,
    *,
    call: Call,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    forwards: float = 0.0,
    timer: Timer = interleaved_milliseconds,
) -> Backend:
    """Returns the requested backend, or for `auto` the faster one that works.

    On the CPU, or without xformers, `auto` is `sdpa`. Otherwise both backends run one layer of each attention shape in
    the model, forward and backward. If xformers raises or its values are wrong, `auto` warns and returns `sdpa`; else
    it returns the backend that takes less time over all layers.

    Args:
        wanted: the requested backend. `sdpa` is returned without running anything; `xformers` is tested first.
        unet: the UNet, on the device that it will run on. Its weights and gradients are not changed.
        call: runs the UNet, or a copy of it, on a number of rows.
        rows: the number of rows per call of the UNet.
        device: the device that the UNet will run on.
        dtype: the dtype of the computation; float32 runs without autocast.
        forwards: the number of rows without a gradient per row with one; in SePPO most of them come from sampling.
        timer: a function that runs functions and returns their times in milliseconds.

    Raises:
        ConfigError: `xformers` is requested but not installed, or does not work here.
    """
    if wanted == "xformers":
        require_xformers(device)
    elif wanted == "sdpa" or device.type != "cuda" or not _has_xformers():
        return "sdpa"
    layers = attention_layers(unet, call, rows, dtype)
    for shape, names in layers.items():
        problem = _xformers_problem(unet.get_submodule(names[0]), shape, dtype)
        if problem is None:
            continue
        message = f"xformers attention does not work here ({shape}, {dtype}): {problem}"
        if wanted == "xformers":
            raise ConfigError(f"{message}; use sdpa or auto")
        warnings.warn(f"{message}; using sdpa instead", stacklevel=2)
        return "sdpa"
    if wanted == "xformers":
        return "xformers"
    totals = total_milliseconds(unet, layers, dtype, timer, forwards)
    return "xformers" if totals["xformers"] < totals["sdpa"] else "sdpa"


def attention_layers(
    unet: UNet,
    call: Call,
    rows: int,
    dtype: torch.dtype,
) -> dict[AttentionShape, list[str]]:
    """Returns the names of the UNet's attention layers by the shapes of their calls. Nothing is computed."""
    layers: dict[AttentionShape, list[str]] = defaultdict(list)

    def recorder(name: str) -> Callable[..., Tensor]:
        def record(
            attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any
        ) -> Tensor:
            context = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape)
            head_dim = attn.inner_dim // attn.heads
            layers[AttentionShape(tuple(hidden_states.shape), context, attn.heads, head_dim)].append(name)
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, **others)

        return record

    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fake = fake_copy(unet)
        for name, module in fake.named_modules():
            if isinstance(module, Attention):
                module.set_processor(recorder(name))
        call(fake, rows)
    return dict(layers)


def total_milliseconds(
    unet: UNet,
    layers: Mapping[AttentionShape, Sequence[str]],
    dtype: torch.dtype,
    timer: Timer,
    forwards: float = 0.0,
) -> dict[Backend, float]:
    """Returns each backend's time for all attention layers: forward, backward and `forwards` gradient-free forwards.

    One layer of each shape is timed, and its time is multiplied by the number of such layers.
    """
    totals: dict[Backend, float] = dict.fromkeys(_PROCESSORS, 0.0)
    for shape, names in layers.items():
        attn = unet.get_submodule(names[0])
        tensors = _example(attn, shape, dtype)
        for run, weight in ((_forward_backward, 1.0), (_forward, forwards)):
            if weight:
                runs = [partial(run, attn, tensors, dtype, backend) for backend in _PROCESSORS]
                for backend, time in zip(_PROCESSORS, timer(runs), strict=True):
                    totals[backend] += len(names) * weight * time
    return totals


def _xformers_problem(attn: Attention, shape: AttentionShape, dtype: torch.dtype) -> str | None:
    """Runs xformers on a layer; returns what is wrong with it, or None if it works."""
    tensors = _example(attn, shape, dtype)
    right = _forward_backward(attn, tensors, dtype, "sdpa")
    try:
        tried = _forward_backward(attn, tensors, dtype, "xformers")
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(tried, right, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what it raises depends on its version, its build and the GPU
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if all(error <= _TOLERANCE[dtype] for error in errors):  # False for NaN
        return None
    return f"its output and gradients are off by {', '.join(f'{error:.1e}' for error in errors)}"


def _example(attn: Attention, shape: AttentionShape, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns normally distributed hidden states, context and output gradient for a layer, from a fixed seed."""
    device = attn.to_q.weight.device
    normal = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    hidden = normal(shape.hidden, requires_grad=True)
    context = None if shape.context is None else normal(shape.context, requires_grad=True)
    return hidden, context, normal(shape.hidden, dtype=dtype)


@torch.no_grad()
def _forward(
    attn: Attention, tensors: tuple[Tensor, Tensor | None, Tensor], dtype: torch.dtype, backend: Backend
) -> list[Tensor]:
    hidden, context, _ = tensors
    with torch.autocast(hidden.device.type, dtype, enabled=dtype != torch.float32):
        return [_processor(backend)(attn, hidden, context)]


def _forward_backward(
    attn: Attention, tensors: tuple[Tensor, Tensor | None, Tensor], dtype: torch.dtype, backend: Backend
) -> list[Tensor]:
    """Returns a layer's output and the gradients of its inputs, without touching the gradients of its weights."""
    hidden, context, gradient = tensors
    with torch.enable_grad(), torch.autocast(hidden.device.type, dtype, enabled=dtype != torch.float32):
        output = _processor(backend)(attn, hidden, context)
    inputs = [x for x in (hidden, context) if x is not None]
    return [output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]


def _processor(backend: Backend) -> ChunkedAttention:
    return ChunkedAttention(_PROCESSORS[backend]())


def _has_xformers() -> bool:
    """Returns whether diffusers found xformers, for which it looks once, when it is imported."""
    return attention_processor.xformers is not None


def require_xformers(device: torch.device) -> None:
    """Raises ConfigError if xformers is not installed or does not run on the device."""
    _require_installed()
    if device.type != "cuda":
        raise ConfigError(f"model.attention = xformers runs on CUDA, not on {device.type}; use sdpa or auto")


def _require_installed() -> None:
    if not _has_xformers():
        raise ConfigError("model.attention = xformers needs xformers: pip install 'seppo_fast[xformers]'")
