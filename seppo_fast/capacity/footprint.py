"""How much memory a batch takes: what batch sizes are chosen from.

A batch's bytes are counted, not guessed: a copy of the model runs forward (and backward) on fake tensors, which have
shapes and storages but no data, while the storages that come and go are added up. That takes seconds, next to no
memory, and no GPU, and it leaves the model alone. What an allocator wastes and a kernel's scratch space are not seen.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.models.fake import fake_copy, follow_cuda
from seppo_fast.models.family import Coder, Inputs

# A footprint is counted at these two numbers of rows.
_FEW, _MANY = 1, 256

FamilyDenoise = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""`Family.denoise`: (model, latents (B, *latent), times (B,), conditioning of B rows) -> prediction (B, *latent)"""


@dataclass(frozen=True)
class Footprint:
    """Bytes that the tensors made in a call take at their peak: `fixed + rows * per_row`.

    Each moment of a call holds some bytes that do not depend on the rows and some that grow with them, and the peak is
    the greatest of these lines. So it is convex in the rows, and the line through the peaks at 1 and at 256 rows is
    exact there and nowhere too low between.

    Attributes:
        fixed: gradients, and casts of weights.
        per_row: activations, mostly.
    """

    fixed: int
    per_row: int

    def largest(self, budget: int, cap: int) -> int:
        """The largest power of two of rows, at most `cap`, that fits into `budget` bytes; 0 where not even one does."""
        rows, following = 0, 1
        while following <= cap and self.fixed + following * self.per_row <= budget:
            rows, following = following, 2 * following
        return rows


def training_footprint(
    model: nn.Module, denoise: FamilyDenoise, inputs: Inputs, dtype: torch.dtype, device: torch.device
) -> Footprint:
    """What a micro-batch of the learner takes; a row is a pair: two latents forward, and backward.

    Gradients of the trained weights are there from the start, as in every micro-batch but the first. The weights and
    the optimizer's state are not counted. Attention counts as one fused kernel, whatever the backend.

    Args:
        model: as it will be trained: trained weights marked, checkpointing and memory format set.
        denoise: calls it, or a copy of it.
        inputs: of so many rows, on the CPU; `Family.example_inputs` of a resolution.
        dtype: of the computation; float32 runs without autocast.
        device: where it will run. Autocast on CUDA keeps more in float32 than on the CPU.
    """

    def call(model: nn.Module, rows: int) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        latents, times, conditioning = inputs(2 * rows)
        target = torch.empty_like(latents)
        with _autocast(dtype):
            prediction = denoise(model, latents, times, conditioning)
        (prediction.float() - target).square().mean().backward()

    return _footprint(model, call, device)


def sampling_footprint(
    model: nn.Module, denoise: FamilyDenoise, inputs: Inputs, dtype: torch.dtype, device: torch.device, guided: bool
) -> Footprint:
    """What a batch of samples takes; a row is one latent, which is two rows of the network where it is guided.

    Args:
        model: as in `training_footprint`, like the other arguments.
        denoise: calls it.
        inputs: of so many rows.
        dtype: of the computation.
        device: where it will run.
        guided: with classifier-free guidance, as one doubled batch.
    """

    def call(model: nn.Module, rows: int) -> None:
        latents, times, conditioning = inputs(rows)
        with torch.no_grad(), _autocast(dtype):
            if guided:
                latents, times = torch.cat([latents, latents]), torch.cat([times, times])
                conditioning = Conditioning.cat([conditioning, conditioning])
            denoise(model, latents, times, conditioning)

    return _footprint(model, call, device)


def round_trip_bytes(coder: Coder, latents: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """Returns what decoding a batch of samples and encoding it takes, the weights of the VAE included.

    Args:
        coder: see `Family.coder`.
        latents: shape of the batch `(B, *latent)`.
        dtype: in which the encoders compute.
        device: where it will run.
    """

    def call(network: nn.Module, rows: int) -> None:
        with torch.no_grad(), _autocast(dtype):
            coder.there_and_back(network, torch.empty(rows, *latents[1:]))

    tensors = itertools.chain(coder.network.parameters(), coder.network.buffers())
    (peak,) = _peaks(coder.network, call, device, latents[:1])
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _footprint(network: nn.Module, call: Callable[[nn.Module, int], None], device: torch.device) -> Footprint:
    peaks = _peaks(network, call, device, (_FEW, _MANY))
    per_row = -(-(peaks[1] - peaks[0]) // (_MANY - _FEW))
    return Footprint(fixed=peaks[0] - _FEW * per_row, per_row=per_row)


def _peaks(
    network: nn.Module, call: Callable[[nn.Module, int], None], device: torch.device, batches: Sequence[int]
) -> list[int]:
    """The most bytes that a call holds at once, for each number of rows."""
    peaks = []
    with FakeTensorMode(), torch.enable_grad():
        model = fake_copy(network)
        if device.type == "cuda":
            follow_cuda(model)
        for rows in batches:
            with _LiveBytes(model) as live:
                call(model, rows)
            peaks.append(live.peak)
    return peaks


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make while it is on, each until it is freed.

    Args:
        model: its weights and buffers are not counted.

    Attributes:
        peak: the most bytes that were there at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or written in place
            return
        self._known.add(storage)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._subtract, storage.nbytes()).atexit = False

    def _subtract(self, size: int) -> None:
        self._live -= size
