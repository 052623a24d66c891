"""Rows of named tensors in a file: of one kind and number of dimensions, but each as long as it is.

Of each name a shard holds all values, row after row, and a table of the rows' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

_SHAPES = ".shapes"  # after a tensor's name: that of the table `(rows, dimensions)` int32


def pack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of a shard, for rows that have the same names."""
    packed: dict[str, Tensor] = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        packed[name] = torch.cat([tensor.reshape(-1) for tensor in tensors])
        shapes = torch.tensor([tuple(tensor.shape) for tensor in tensors], dtype=torch.int32)
        packed[name + _SHAPES] = shapes.reshape(len(tensors), -1)
    return packed


class PackedRows:
    """One name's rows in a shard, as views of its values.

    Attributes:
        block: all of them `(rows, *shape)` where they have one shape, else None.

    Args:
        values: `(sum of sizes,)`.
        shapes: `(rows, dimensions)` int32.

    Raises:
        ValueError: the one is not of the other.
    """

    def __init__(self, values: Tensor, shapes: Tensor) -> None:
        if shapes.dim() != 2 or shapes.dtype != torch.int32 or not len(shapes):
            raise ValueError(f"a table of shapes {tuple(shapes.shape)} {shapes.dtype}")
        # Tensors, since a large cache has millions of rows.
        self._shapes = shapes
        self._ends = shapes.long().prod(1).cumsum(0)
        if (shapes < 0).any() or values.shape != (int(self._ends[-1]),):
            raise ValueError(f"{tuple(values.shape)} values for rows of {int(self._ends[-1])}")
        self._values = values
        distinct = self.distinct()
        self.block = values.view(len(shapes), *distinct.pop()) if len(distinct) == 1 else None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, row: int) -> Tensor:
        shape, end = self._shapes[row].tolist(), int(self._ends[row])
        return self._values[end - prod(shape) : end].view(shape)

    def distinct(self) -> set[tuple[int, ...]]:
        """Returns the shapes that rows have."""
        if not self._shapes.shape[1]:  # numbers
            return {()}
        return {tuple(shape) for shape in self._shapes.unique(dim=0).tolist()}

    @staticmethod
    def names(keys: Sequence[str]) -> list[str]:
        """Returns the names of the rows' tensors among those of a shard."""
        return [key for key in keys if not key.endswith(_SHAPES)]

    @staticmethod
    def table(name: str) -> str:
        """Returns the name of the table that belongs to a tensor."""
        return name + _SHAPES
