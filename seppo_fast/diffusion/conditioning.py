"""What a model is conditioned on beside time: named tensors, one row a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class Conditioning(Mapping[str, Tensor]):
    """Named tensors `(rows, ...)` of equally many rows: text embeddings, pooled ones, masks, sizes.

    Rows of different lengths have to be padded before they can be put together; how is the model family's business
    (`Family.collate`).

    Args:
        tensors: by name, at least one; a row of each belongs to one sample.

    Raises:
        ValueError: no tensor, or different numbers of rows.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"tensors must have equally many rows, got {rows}")
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """How many tensors there are, as for every mapping; see `rows`."""
        return len(self._tensors)

    @property
    def rows(self) -> int:
        """How many samples it is of."""
        return len(next(iter(self._tensors.values())))

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Returns what `function` makes of each tensor."""
        return Conditioning({name: function(tensor) for name, tensor in self.items()})

    def take(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        """Returns the chosen rows, in their order."""
        return self.map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> Conditioning:
        """Returns all rows once after the other, `times` times."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def expand(self, rows: int) -> Conditioning:
        """Returns a single row as `rows` views of it."""
        return self.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def split(self, size: int) -> list[Conditioning]:
        """Returns consecutive runs of at most `size` rows."""
        return [self.take(slice(start, start + size)) for start in range(0, self.rows, size)]

    def to(self, device: torch.device) -> Conditioning:
        """Returns the same on a device."""
        return self.map(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Returns the rows of all parts, one part after the other.

        Raises:
            ValueError: parts with other names, or rows of another shape.
        """
        first = parts[0]
        for part in parts:
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in part.items()}
            if shapes != {name: tuple(tensor.shape[1:]) for name, tensor in first.items()}:
                raise ValueError(f"rows of different shapes cannot be put together: {first!r} and {part!r}")
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in first})

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.items())
        return f"Conditioning({shapes})"
