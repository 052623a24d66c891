"""Rows of named tensors in a file: of one kind and number of dimensions, but each as long as it is.

Of each name a shard holds all values, row after row, and a table of the rows' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
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

    Args:
        values: `(sum of sizes,)`.
        shapes: `(rows, dimensions)` int32.

    Raises:
        ValueError: the one is not of the other.
    """

    def __init__(self, values: Tensor, shapes: Tensor) -> None:
        if shapes.dim() != 2 or shapes.dtype != torch.int32 or not len(shapes):
            raise ValueError(f"a table of shapes {tuple(shapes.shape)} {shapes.dtype}")
        self.shapes = [tuple(shape) for shape in shapes.tolist()]
        self._ends = list(accumulate(prod(shape) for shape in self.shapes))
        if any(side < 0 for shape in self.shapes for side in shape) or values.shape != (self._ends[-1],):
            raise ValueError(f"{tuple(values.shape)} values for rows of {sum(map(prod, self.shapes))}")
        self._values = values

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> Tensor:
        shape, end = self.shapes[row], self._ends[row]
        return self._values[end - prod(shape) : end].view(shape)

    @staticmethod
    def names(keys: Sequence[str]) -> list[str]:
        """Returns the names of the rows' tensors among those of a shard."""
        return [key for key in keys if not key.endswith(_SHAPES)]

    @staticmethod
    def table(name: str) -> str:
        """Returns the name of the table that belongs to a tensor."""
        return name + _SHAPES
