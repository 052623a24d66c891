"""A module's trained state as one piece of memory, in which a past policy is kept and copied at once.

The state is the trained parameters and the buffers that belong to the module's `state_dict`. A `PackedLayout` says
where each tensor lies in a slab, a plain tensor of bytes; views of a slab stay valid wherever it is copied.
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

# Bytes, as PyTorch's allocator aligns: cuBLASLt chooses its algorithm by the alignment of each operand, up to 256.
_ALIGNMENT = 512
# Of these, autocast casts the parameters before each use.
_CAST = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor lies.

    Attributes:
        name: in the module.
        shape: of the tensor.
        stride: of the tensor in the slab; that of the module's own where this is dense.
        dtype: in which it is kept, without `torch.`.
        offset: bytes from the slab's beginning.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True)
class PackedLayout:
    """Names, shapes and places of the tensors of a slab.

    Attributes:
        slots: in the order of the module.
        size: bytes of a slab.
    """

    slots: tuple[TensorSlot, ...]
    size: int

    @classmethod
    def of(cls, module: nn.Module, compute: torch.dtype = torch.float32) -> PackedLayout:
        """The layout of a module's state.

        Args:
            module: its trained parameters marked.
            compute: of autocast. Where that is half precision, float32 parameters that autocast casts before each use
                (of linear and convolutional layers, and of no other layer besides) are kept as it casts them: the
                same predictions bit for bit from half the bytes.
        """
        cast = _cast_by_autocast(module) if compute in (torch.float16, torch.bfloat16) else set()
        slots = []
        for name, tensor in trainable_state_dict(module).items():
            dtype = compute if id(tensor) in cast and tensor.dtype == torch.float32 else tensor.dtype
            stride = torch.empty_like(tensor, device="meta").stride()
            slots.append(TensorSlot(name, tuple(tensor.shape), tuple(stride), str(dtype).removeprefix("torch."), 0))
        return cls(tuple(slots), 0).repacked()

    def repacked(self) -> PackedLayout:
        """Returns the layout of the same tensors in the same order at the alignment of today's slabs."""
        slots, offset = [], 0
        for slot in self.slots:
            slots.append(replace(slot, offset=offset))
            offset += -(-_bytes(slot) // _ALIGNMENT) * _ALIGNMENT
        return PackedLayout(tuple(slots), offset)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PackedLayout:
        """What `to_json` made.

        Raises:
            ValueError, KeyError, TypeError: a malformed tree, or slots that overlap or leave the slab.
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
        """Numbers, strings and lists only."""
        return {"size": self.size, "entries": [asdict(slot) for slot in self.slots]}

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Names, shapes and dtypes, without how they lie in memory."""
        return [(slot.name, slot.shape, slot.dtype) for slot in self.slots]

    @property
    def payload(self) -> int:
        """Bytes of the tensors alone."""
        return sum(_bytes(slot) for slot in self.slots)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in a slab, by name.

        Args:
            slab: `(size,)` uint8, dense, on any device.

        Raises:
            ValueError: an slot that leaves the slab, or a dtype that torch does not know.
        """
        return {slot.name: _view(slab, slot) for slot in self.slots}

    @torch.no_grad()
    def fill(self, slab: Tensor | None, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors to their places in a slab, rounded to the dtypes in which they are kept.

        Args:
            slab: None in a process that only takes part in gathering.
            tensors: by name; sharded ones are gathered, one at a time, for which all processes call this.
        """
        views = {} if slab is None else self.views(slab)
        for slot in self.slots:
            values = gather_full(tensors[slot.name])
            if slab is not None:
                view = views[slot.name]
                # Rounded where the values are: a copy from a GPU to another dtype would convert on the CPU.
                view.copy_(values.to(view.dtype))

    def check(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's trained state, its names and shapes compared with the table's.

        Raises:
            ValueError: they differ; it lists where, ten lines at most.
        """
        state = trainable_state_dict(module)
        self._compare(state, state)
        return state

    def find(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's tensors of the table's names, trained or not.

        Raises:
            ValueError: one is not there or has another shape, as `check`.
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
            raise ValueError("module: its tensors are not those of the pool\n" + "\n".join(lines[:10]) + more)


def trainable_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and buffers by name, live; a tensor with several names (tied weights) has its first."""
    kept = set(module.state_dict(keep_vars=True))
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    return parameters | {name: value for name, value in module.named_buffers() if name in kept}


def _cast_by_autocast(module: nn.Module) -> set[int]:
    """Ids of parameters of which every owner is a layer whose parameters autocast casts."""
    owned: set[int] = set()
    other: set[int] = set()
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            # Other names are of a norm of the weights, say, that is computed from them in float32.
            cast = type(layer) in _CAST and name in ("weight", "bias")
            (owned if cast else other).add(id(parameter))
    return owned - other


def _bytes(slot: TensorSlot) -> int:
    return math.prod(slot.shape) * getattr(torch, slot.dtype).itemsize


def _view(slab: Tensor, slot: TensorSlot) -> Tensor:
    dtype = getattr(torch, slot.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{slot.name}: {slot.dtype!r} is no dtype")
    end, count = slot.offset + _bytes(slot), math.prod(slot.shape)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(slot.shape, slot.stride, strict=True))
    # Slabs of older versions are aligned to less.
    if end > len(slab) or slot.offset % dtype.itemsize or (count and reach != count):
        raise ValueError(f"{slot.name}: leaves the slab of {len(slab)} bytes")
    return slab[slot.offset : end].view(dtype).as_strided(slot.shape, slot.stride)


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size, stride or offset")
    return value
