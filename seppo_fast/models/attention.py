"""Which attention a UNet runs on: PyTorch's own (SDPA) or xformers', one for policy and reference alike.

Both are exact attention by fused kernels, which round differently. Which is faster depends on GPU, shapes and versions,
so `auto` measures them on the model's own attention layers.
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
"""(network, rows) -> what it gives for inputs of so many rows, made there."""
Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]

# Fused kernels fail where rows x heads, one side of their grid, reaches this (xformers#845, pytorch#142228).
GRID_LIMIT = 65_536

_PROCESSORS: dict[Backend, type] = {"sdpa": AttnProcessor2_0, "xformers": XFormersAttnProcessor}

# How far two right kernels may lie apart, relative and as a root mean square: a few roundings of the dtype, of TF32 for
# float32.
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class ChunkedAttention:
    """A diffusers attention processor that hands another one as many rows at once as fused kernels take.

    A row attends to itself alone, so splitting the rows changes nothing.

    Args:
        processor: the one that computes.
        limit: the rows times heads of each of its calls stay below it.
    """

    def __init__(self, processor: Callable[..., Tensor], limit: int = GRID_LIMIT) -> None:
        self._processor = processor
        self._limit = limit

    # `Attention` drops what its processor's signature does not name; this one is that of the processors within.
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
        # A mask may have a row for each head of each row.
        split = [[None] * chunks if x is None else x.split(size * (len(x) // rows)) for x in inputs]
        return torch.cat([self._processor(attn, *chunk, *args, **kwargs) for chunk in zip(*split, strict=True)])


@dataclass(frozen=True)
class AttentionShape:
    """A shape in which attention is called.

    Attributes:
        hidden: of what attends: (rows, tokens, channels), or (rows, channels, height, width).
        context: of what it attends to, (rows, L, D); None where the tokens attend to themselves.
        heads: among which the inner width is divided.
        head_dim: width of one head.
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
    """Sets the attention of a UNet, with or without a LoRA; batches beyond what its kernels take are split by rows.

    Raises:
        ValueError: an unknown backend, or attention that is not the plain one and that this would change.
        ConfigError: xformers is not installed.
    """
    if backend not in _PROCESSORS:
        raise ValueError(f"backend: {backend!r} is unknown, use one of {', '.join(_PROCESSORS)}")
    plain = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, ChunkedAttention)
    for name, processor in unet.attn_processors.items():
        if type(processor) not in plain:
            raise ValueError(f"unet: {name} is a {type(processor).__name__}, only plain attention can be replaced")
    if backend == "xformers":
        _require_installed()
    unet.set_attn_processor(_processor(backend))


def interleaved_milliseconds(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """Median time of each function on the current CUDA device; they take turns, so all see the same clock rate."""
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
    """The backend that is wanted; for `auto`, the faster one that works.

    On the CPU, and without xformers, `auto` is `sdpa`. Else both backends run a layer of each attention shape of the
    model, forward and backward. Where xformers raises, or its values are off, `auto` warns and is `sdpa`; else it is
    whichever takes less time over all layers.

    Args:
        wanted: `sdpa` is taken as it is, and nothing is run; `xformers` is tried.
        unet: on the device it will run on. Weights and their gradients are left alone.
        call: runs the UNet, or a copy of it, on a number of rows.
        rows: of the UNet in one call.
        device: where it will run.
        dtype: of the computation; float32 runs without autocast.
        forwards: rows without gradient for each row with one; sampling is most of SePPO's.
        timer: takes functions and returns their milliseconds.

    Raises:
        ConfigError: `xformers` is wanted, and is not installed or does not work here.
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
        warnings.warn(f"{message}; sdpa is used", stacklevel=2)
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
    """The names of the UNet's attention layers, by the shape in which its forward calls them; nothing is computed."""
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
    """Time of all attention layers by backend: forward and backward, and `forwards` more without gradient.

    Of each shape one layer is timed.
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
    """What is wrong with xformers for a layer, None where it works."""
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
    """Normal hidden states and context as a layer is given them, and a gradient of its output; always the same."""
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
    """Output of a layer and the gradients of its inputs; those of its weights are not touched."""
    hidden, context, gradient = tensors
    with torch.enable_grad(), torch.autocast(hidden.device.type, dtype, enabled=dtype != torch.float32):
        output = _processor(backend)(attn, hidden, context)
    inputs = [x for x in (hidden, context) if x is not None]
    return [output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]


def _processor(backend: Backend) -> ChunkedAttention:
    return ChunkedAttention(_PROCESSORS[backend]())


def _has_xformers() -> bool:
    """Whether the processor of diffusers found xformers, which it looks for once, when it is imported."""
    return attention_processor.xformers is not None


def require_xformers(device: torch.device) -> None:
    """Raises ConfigError where xformers is not installed, or does not run on the device."""
    _require_installed()
    if device.type != "cuda":
        raise ConfigError(f"model.attention = xformers runs on CUDA, not on {device.type}; use sdpa or auto")


def _require_installed() -> None:
    if not _has_xformers():
        raise ConfigError("model.attention = xformers needs xformers: pip install 'seppo_fast[xformers]'")
