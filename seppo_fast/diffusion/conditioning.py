"""The conditioning of a model, apart from time: named tensors with one row per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class Conditioning(Mapping[str, Tensor]):
    """Named tensors `(rows, ...)` with the same number of rows: text embeddings, pooled embeddings, masks, sizes.

    Rows of different lengths must be padded before they can be combined; `Family.collate` does that.

    Args:
        tensors: at least one tensor, by name. Row i of every tensor belongs to sample i.

    Raises:
        ValueError: There are no tensors, or their numbers of rows differ.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        rows = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(rows.values())) != 1:
            raise ValueError(f"tensors: expected at least one, all with the same number of rows, got {rows}")
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """Returns the number of tensors, as for every mapping. The number of samples is `rows`."""
        return len(self._tensors)

    @property
    def rows(self) -> int:
        """The number of samples."""
        return len(next(iter(self._tensors.values())))

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Returns a conditioning with `function` applied to each tensor."""
        return Conditioning({name: function(tensor) for name, tensor in self.items()})

    def take(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        """Returns the rows at these indices, in the order given."""
        return self.map(lambda tensor: tensor[rows])

    def repeat(self, times: int) -> Conditioning:
        """Returns the whole batch of rows repeated `times` times."""
        return self.map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def expand(self, rows: int) -> Conditioning:
        """Returns a single row expanded to `rows` rows, without copying."""
        return self.map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def split(self, size: int) -> list[Conditioning]:
        """Returns the rows in consecutive chunks of at most `size`."""
        return [self.take(slice(start, start + size)) for start in range(0, self.rows, size)]

    def to(self, device: torch.device) -> Conditioning:
        """Returns the conditioning on a device."""
        return self.map(lambda tensor: tensor.to(device))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenates the rows of all parts.

        Raises:
            ValueError: The parts differ in the names of their tensors or in the shapes of their rows.
        """
        first = parts[0]
        for part in parts:
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in part.items()}
            if shapes != {name: tuple(tensor.shape[1:]) for name, tensor in first.items()}:
                raise ValueError(f"rows of different shapes cannot be concatenated: {first!r} and {part!r}")
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in first})

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.items())
        return f"Conditioning({shapes})"
