"""Counts how much memory a batch takes; batch sizes are chosen from these counts.

A copy of the model runs forward (and backward) on fake tensors, which have shapes and storages but no data, while the
bytes of all live storages are added up. This takes seconds, hardly any memory and no GPU, and does not change the
model. It does not see an allocator's fragmentation or a kernel's scratch space.
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

# The two numbers of rows at which a footprint is counted.
_FEW, _MANY = 1, 256

FamilyDenoise = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""`Family.denoise`: (model, latents (B, *latent), times (B,), conditioning of B rows) -> prediction (B, *latent)"""


@dataclass(frozen=True)
class Footprint:
    """The peak memory of the tensors made in a call, as a function of its rows: `fixed + rows * per_row` bytes.

    At each moment of a call, live memory is a constant plus a part proportional to the rows; the peak is the maximum of
    these lines. So it is convex in the rows, and the line through the peaks at 1 and at 256 rows is exact at both ends
    and never too low in between.

    Attributes:
        fixed: bytes that do not depend on the rows: gradients, and casts of weights.
        per_row: bytes per row, mostly activations.
    """

    fixed: int
    per_row: int

    def largest(self, budget: int, cap: int) -> int:
        """Returns the largest power of two, at most `cap`, of rows that fit into `budget` bytes, or 0 if none fits."""
        rows, following = 0, 1
        while following <= cap and self.fixed + following * self.per_row <= budget:
            rows, following = following, 2 * following
        return rows


def training_footprint(
    model: nn.Module,
    denoise: FamilyDenoise,
    inputs: Inputs,
    dtype: torch.dtype,
    device: torch.device,
    each: int = 2,
) -> Footprint:
    """Counts the memory of one of the learner's micro-batches, forward and backward, by its rows, which are pairs.

    Gradients of the trained weights exist from the start, as in every micro-batch but the first. The weights and the
    optimizer's state are not counted. Attention counts as one fused kernel, whatever the backend.

    Args:
        model: the network as it will be trained: `requires_grad`, checkpointing and memory format are set.
        denoise: calls the network, or a copy of it.
        inputs: makes inputs with a given number of rows, on the CPU; see `Family.example_inputs`.
        dtype: the compute dtype; float32 runs without autocast.
        device: where the run will compute. Autocast on CUDA keeps more in float32 than on the CPU.
        each: rows of the network per row of a micro-batch, 2 for a pair; see `capacity.work.network_rows`.
    """

    def call(model: nn.Module, rows: int) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        latents, times, conditioning = inputs(each * rows)
        target = torch.empty_like(latents)
        with _autocast(dtype):
            prediction = denoise(model, latents, times, conditioning)
        (prediction.float() - target).square().mean().backward()

    return _footprint(model, call, device)


def sampling_footprint(
    model: nn.Module, denoise: FamilyDenoise, inputs: Inputs, dtype: torch.dtype, device: torch.device, guided: bool
) -> Footprint:
    """Counts the memory of a sampling batch; a row is one latent, which with guidance is two rows of the network.

    Args:
        model: the network; this and the next arguments are as in `training_footprint`.
        denoise: calls the network.
        inputs: makes inputs with a given number of rows.
        dtype: the compute dtype.
        device: where the run will compute.
        guided: whether samples use classifier-free guidance, computed as one doubled batch.
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
    """Returns how many bytes decoding and encoding a batch of samples takes, including the VAE's weights.

    Args:
        coder: decodes and encodes; see `Family.coder`.
        latents: the shape of the batch, `(B, *latent)`.
        dtype: the dtype in which the encoders compute.
        device: where the run will compute.
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
    """Returns the peak bytes of a call for each number of rows in `batches`."""
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
    """Adds up the bytes of all storages that operations allocate inside the block, until each is freed.

    Args:
        model: the network, whose weights and buffers are not counted.

    Attributes:
        peak: the most bytes that were live at once.
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
        if storage in self._known:  # the result is a view, or was computed in place
            return
        self._known.add(storage)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._subtract, storage.nbytes()).atexit = False

    def _subtract(self, size: int) -> None:
        self._live -= size
