"""A module's trained state as one piece of memory, in which a past policy is kept and copied at once.

The state is the trained parameters and the buffers that belong to the module's `state_dict`. A `Table` says where each
tensor lies in a slab, a plain tensor of bytes; tensors that are views of a slab follow it wherever it is copied.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.distributed.fsdp import whole

# Bytes, as PyTorch's allocator aligns: cuBLASLt chooses its algorithm by the alignment of each operand, up to 256.
_ALIGNMENT = 512
# Of these, autocast casts the parameters before each use.
_CAST = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
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
class Table:
    """Names, shapes and places of the tensors of a slab.

    Attributes:
        entries: in the order of the module.
        size: bytes of a slab.
    """

    entries: tuple[Entry, ...]
    size: int

    @classmethod
    def of(cls, module: nn.Module, compute: torch.dtype = torch.float32) -> Table:
        """The table of a module's state.

        Args:
            module: its trained parameters marked.
            compute: of autocast. Where that is half precision, float32 parameters that autocast casts before each use
                (of linear and convolutional layers, and of no other layer besides) are kept as it casts them: the
                same predictions bit for bit from half the bytes.
        """
        cast = _cast_by_autocast(module) if compute in (torch.float16, torch.bfloat16) else set()
        entries = []
        for name, tensor in trained_state(module).items():
            dtype = compute if id(tensor) in cast and tensor.dtype == torch.float32 else tensor.dtype
            stride = torch.empty_like(tensor, device="meta").stride()
            entries.append(Entry(name, tuple(tensor.shape), tuple(stride), str(dtype).removeprefix("torch."), 0))
        return cls(tuple(entries), 0).repacked()

    def repacked(self) -> Table:
        """Returns the table of the same tensors in the same order at the alignment of today's slabs."""
        entries, offset = [], 0
        for entry in self.entries:
            entries.append(replace(entry, offset=offset))
            offset += -(-_bytes(entry) // _ALIGNMENT) * _ALIGNMENT
        return Table(tuple(entries), offset)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Table:
        """What `to_json` made.

        Raises:
            ValueError, KeyError, TypeError: a tree that is no table, or entries that leave its slab or share its bytes.
        """
        entries = tuple(
            Entry(str(e["name"]), _numbers(e["shape"]), _numbers(e["stride"]), str(e["dtype"]), _number(e["offset"]))
            for e in tree["entries"]
        )
        table = cls(entries, _number(tree["size"]))
        table.views(torch.empty(table.size, dtype=torch.uint8, device="meta"))
        for entry, following in itertools.pairwise(entries):
            if entry.offset + _bytes(entry) > following.offset:
                raise ValueError(f"{following.name}: begins before {entry.name} ends")
        return table

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings and lists only."""
        return {"size": self.size, "entries": [asdict(entry) for entry in self.entries]}

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Names, shapes and dtypes, without how they lie in memory."""
        return [(entry.name, entry.shape, entry.dtype) for entry in self.entries]

    @property
    def payload(self) -> int:
        """Bytes of the tensors alone."""
        return sum(_bytes(entry) for entry in self.entries)

    def views(self, slab: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in a slab, by name.

        Args:
            slab: `(size,)` uint8, dense, on any device.

        Raises:
            ValueError: an entry that leaves the slab, or a dtype that torch does not know.
        """
        return {entry.name: _view(slab, entry) for entry in self.entries}

    @torch.no_grad()
    def fill(self, slab: Tensor | None, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors to their places in a slab, rounded to the dtypes in which they are kept.

        Args:
            slab: None in a process that only takes part in gathering.
            tensors: by name; sharded ones are gathered, one at a time, for which all processes call this.
        """
        views = {} if slab is None else self.views(slab)
        for entry in self.entries:
            values = whole(tensors[entry.name])
            if slab is not None:
                view = views[entry.name]
                # Rounded where the values are: a copy from a GPU to another dtype would convert on the CPU.
                view.copy_(values.to(view.dtype))

    def check(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's trained state, its names and shapes compared with the table's.

        Raises:
            ValueError: they differ; it lists where, ten lines at most.
        """
        state = trained_state(module)
        self._compare(state, state)
        return state

    def find(self, module: nn.Module) -> dict[str, Tensor]:
        """A module's tensors of the table's names, trained or not.

        Raises:
            ValueError: one is not there or has another shape, as `check`.
        """
        tensors: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        self._compare(tensors, {})
        return {entry.name: tensors[entry.name] for entry in self.entries}

    def _compare(self, tensors: Mapping[str, Tensor], all_of: Mapping[str, Tensor]) -> None:
        ours = {entry.name: entry.shape for entry in self.entries}
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


def trained_state(module: nn.Module) -> dict[str, Tensor]:
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


def _bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize


def _view(slab: Tensor, entry: Entry) -> Tensor:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry.name}: {entry.dtype!r} is no dtype")
    end, count = entry.offset + _bytes(entry), math.prod(entry.shape)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(entry.shape, entry.stride, strict=True))
    # Slabs of older versions are aligned to less.
    if end > len(slab) or entry.offset % dtype.itemsize or (count and reach != count):
        raise ValueError(f"{entry.name}: leaves the slab of {len(slab)} bytes")
    return slab[entry.offset : end].view(dtype).as_strided(entry.shape, entry.stride)


def _numbers(values: Any) -> tuple[int, ...]:
    return tuple(_number(value) for value in values)


def _number(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no size, stride or offset")
    return value
