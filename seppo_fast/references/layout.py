"""The layout of a module's trained state in one piece of memory, so that a past policy is kept and copied as a whole.

The state is the trained parameters and the buffers that belong to the module's `state_dict`. A `PackedLayout` says
where each tensor lies in a slab, a plain tensor of bytes; it applies to every copy of the slab.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.distributed.fsdp import gather_full

# In bytes, as in PyTorch's allocator: cuBLASLt chooses its algorithm by the alignment of each operand, up to 256.
_ALIGNMENT = 512
# Layers whose parameters autocast casts before each use.
_CAST = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's place in a slab.

    Attributes:
        name: the tensor's name in the module.
        shape: the tensor's shape.
        stride: its stride in the slab; equal to that in the module if the module's tensor is dense.
        dtype: the dtype in which it is stored, without `torch.`.
        offset: bytes from the start of the slab.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class PackedLayout:
    """The names, shapes and places of the tensors in a slab.

    Attributes:
        slots: one per tensor, in the module's order.
        size: bytes of a slab.
    """

    slots: tuple[TensorSlot, ...]
    size: int

    @classmethod
    def of(cls, module: nn.Module, compute: torch.dtype = torch.float32) -> PackedLayout:
        """Returns the layout of a module's state.

        Args:
            module: the module, its trained parameters marked (`requires_grad`).
            compute: the autocast dtype. If it is half precision, float32 parameters that autocast casts before each use
                are stored as it casts them, which gives the same predictions bit for bit from half the bytes. These are
                the parameters of linear and convolutional layers that no other layer uses.
        """
        cast = _cast_by_autocast(module) if compute in (torch.float16, torch.bfloat16) else set()
        slots = []
        for name, tensor in trainable_state_dict(module).items():
            dtype = compute if id(tensor) in cast and tensor.dtype == torch.float32 else tensor.dtype
            stride = torch.empty_like(tensor, device="meta").stride()
            slots.append(TensorSlot(name, tuple(tensor.shape), tuple(stride), str(dtype).removeprefix("torch."), 0))
        return cls(tuple(slots), 0).repacked()

    def repacked(self) -> PackedLayout:
        """Returns the layout of the same tensors in the same order, with the current alignment."""
        slots, offset = [], 0
        for slot in self.slots:
            slots.append(replace(slot, offset=offset))
            offset += -(-_bytes(slot) // _ALIGNMENT) * _ALIGNMENT
        return PackedLayout(tuple(slots), offset)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PackedLayout:
        """Returns the layout that `to_json` described.

        Raises:
            ValueError, KeyError, TypeError: the tree is malformed, or slots overlap or do not fit into the slab.
        """
        slots = tuple(
            TensorSlot(
                str(e["name"]), _numbers(e["shape"]), _numbers(e["stride"]), str(e["dtype"]), _number(e["offset"])
            )
            for e in tree["entries"]
        )
        layout = cls(slots, _number(tree["size"]))
        layout.views(torch.empty(layout.size, dtype=torch.uint8, device="meta"))
        for slot, following in itertools.pairwise(slots):
            if slot.offset + _bytes(slot) > following.offset:
                raise ValueError(f"{following.name}: begins before {slot.name} ends")
        return layout

    def to_json(self) -> dict[str, Any]:
        """Returns a dictionary of numbers, strings and lists, to be written as JSON."""
        return {"size": self.size, "entries": [asdict(slot) for slot in self.slots]}

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Names, shapes and dtypes, without the placement in memory."""
        return [(slot.name, slot.shape, slot.dtype) for slot in self.slots]

    @property
    def payload(self) -> int:
        """Bytes of the tensors alone, without the gaps between them."""
        return sum(_bytes(slot) for slot in self.slots)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        """Returns views of the tensors in a slab, by name.

        Args:
            slab: `(size,)` uint8, dense, on any device.

        Raises:
            ValueError: a slot does not fit into the slab, or torch does not know its dtype.
        """
        return {slot.name: _view(slab, slot) for slot in self.slots}

    @torch.no_grad()
    def fill(self, slab: Tensor | None, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors to their places in a slab, rounded to the dtypes in which they are stored.

        Args:
            slab: the slab; None in a process that only takes part in gathering.
            tensors: tensors by name; sharded ones are gathered one at a time, so all processes must call this.
        """
        views = {} if slab is None else self.views(slab)
        for slot in self.slots:
            values = gather_full(tensors[slot.name])
            if slab is not None:
                view = views[slot.name]
                # Rounded on the device of the values: a copy from a GPU to another dtype would convert on the CPU.
                view.copy_(values.to(view.dtype))

    def check(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns a module's trained state, after comparing its names and shapes with the layout's.

        Raises:
            ValueError: they differ; the message lists how, in ten lines at most.
        """
        state = trainable_state_dict(module)
        self._compare(state, state)
        return state

    def find(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns the module's tensors with the names in the layout, trained or not.

        Raises:
            ValueError: a tensor is missing or has another shape; the message is that of `check`.
        """
        tensors: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        self._compare(tensors, {})
        return {slot.name: tensors[slot.name] for slot in self.slots}

    def _compare(self, tensors: Mapping[str, Tensor], all_of: Mapping[str, Tensor]) -> None:
        ours = {slot.name: slot.shape for slot in self.slots}
        theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        lines = [f"{name}: {shape} is not in the module" for name, shape in ours.items() if name not in theirs]
        lines += [f"{name}: {theirs[name]} is not in the pool" for name in all_of if name not in ours]
        lines += [
            f"{name}: {shape} in the pool, {theirs[name]} in the module"
            for name, shape in ours.items()
            if name in theirs and theirs[name] != shape
        ]
        if lines:
            more = f"\n... and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise ValueError("module: its tensors do not match the pool's\n" + "\n".join(lines[:10]) + more)


def trainable_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Returns the trained parameters and saved buffers by name, not copied; a tied weight has its first name only."""
    kept = set(module.state_dict(keep_vars=True))
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return parameters | {name: value for name, value in module.named_buffers() if name in kept}


def _cast_by_autocast(module: nn.Module) -> set[int]:
    """Returns the ids of parameters that belong only to layers whose parameters autocast casts."""
    owned: set[int] = set()
    other: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            # Parameters with other names, such as weight_norm's, are what the weight is computed from in float32.
            cast = type(layer) in _CAST and name in ("weight", "bias")
            (owned if cast else other).add(id(parameter))
    return owned - other


def _bytes(slot: TensorSlot) -> int:
    return math.prod(slot.shape) * getattr(torch, slot.dtype).itemsize


def _view(slab: Tensor, slot: TensorSlot) -> Tensor:
    dtype = getattr(torch, slot.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{slot.name}: {slot.dtype!r} is not a dtype")
    end, count = slot.offset + _bytes(slot), math.prod(slot.shape)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(slot.shape, slot.stride, strict=True))
    # Only the dtype's own alignment is required: slabs of older versions are aligned to fewer bytes.
    if end > len(slab) or slot.offset % dtype.itemsize or (count and reach != count):
        raise ValueError(f"{slot.name}: does not fit into the slab of {len(slab)} bytes")
    return slab[slot.offset : end].view(dtype).as_strided(slot.shape, slot.stride)


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a valid size, stride or offset")
    return value
