"""Packs rows of named tensors into shards; rows share dtype and number of dimensions, but may differ in shape.

For each name a shard holds all values, flattened and concatenated row by row, and a table of the rows' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

_SHAPES = ".shapes"  # suffix of the name of a tensor's table of shapes, int32 `(rows, dimensions)`


def pack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of a shard; all rows must have the same names."""
    packed: dict[str, Tensor] = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        packed[name] = torch.cat([tensor.reshape(-1) for tensor in tensors])
        shapes = torch.tensor([tuple(tensor.shape) for tensor in tensors], dtype=torch.int32)
        packed[name + _SHAPES] = shapes.reshape(len(tensors), -1)
    return packed


class PackedRows:
    """The rows stored under one name in a shard, as views of its values.

    Attributes:
        block: all rows as one tensor `(rows, *shape)`, or None if their shapes differ.

    Args:
        values: all rows' values, flattened and concatenated.
        shapes: the rows' shapes, int32 `(rows, dimensions)`.

    Raises:
        ValueError: `shapes` is malformed, or does not match the number of `values`.
    """

    def __init__(self, values: Tensor, shapes: Tensor) -> None:
        if shapes.dim() != 2 or shapes.dtype != torch.int32 or not len(shapes):
            raise ValueError(f"malformed table of shapes: {tuple(shapes.shape)} {shapes.dtype}")
        # Kept as tensors, not lists: a large cache has millions of rows.
        self._shapes = shapes
        self._ends = shapes.long().prod(1).cumsum(0)
        if (shapes < 0).any() or values.shape != (int(self._ends[-1]),):
            raise ValueError(f"{tuple(values.shape)} values, but the table of shapes needs {int(self._ends[-1])}")
        self._values = values
        distinct = self.distinct()
        self.block = values.view(len(shapes), *distinct.pop()) if len(distinct) == 1 else None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, row: int) -> Tensor:
        shape, end = self._shapes[row].tolist(), int(self._ends[row])
        return self._values[end - prod(shape) : end].view(shape)

    def distinct(self) -> set[tuple[int, ...]]:
        """Returns the distinct shapes of the rows."""
        if not self._shapes.shape[1]:  # scalars
            return {()}
        return {tuple(shape) for shape in self._shapes.unique(dim=0).tolist()}

    @staticmethod
    def names(keys: Sequence[str]) -> list[str]:
        """Returns the keys of a shard that hold values, leaving out the tables of shapes."""
        return [key for key in keys if not key.endswith(_SHAPES)]

    @staticmethod
    def table(name: str) -> str:
        """Returns the key of a tensor's table of shapes."""
        return name + _SHAPES
