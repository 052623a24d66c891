"""A finished latent cache: the winners, losers and conditions that training reads, memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seppo_fast.data.cache.rows import PackedRows
from seppo_fast.data.examples import Problem, counted
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.files import read_json

FORMAT_VERSION = 3
INDEX = "index.json"


class LatentCache:
    """Random access to a finished cache; rows are returned as copies, in the dtype in which they were stored.

    Attributes:
        ids: Each example's id, in order.
        prompts: Each example's prompt, in order.
        num_examples: The number of examples; also `len(cache)`.
        has_losers: Whether `losers` may be called.
        latent_shapes: The distinct latent shapes, such as (4, 64, 64) for images or (4, 16, 32, 32) for clips.
        fingerprint: The full key, sha256 in hex: equal exactly if the content is equal, whatever the format.
        former: The key of the same content from the time when keys included the format; older run states record it.
        numbers: One number per example (such as a label or score) or None; None if no example has one.
        truncated: The prompts that the text encoder truncates.
        dropped: The examples left out while building, each with its reason.
        remarks: The names of noteworthy images and clips (used all the same), by kind; see `remarks.remark_lines`.

    Args:
        folder: The cache's folder.
        key: The expected fingerprint.
        former: The value for the attribute `former`.
        collate: Batches single prompt embeddings that differ in shape; see `Family.collate`.

    Raises:
        DataError: the cache is incomplete or damaged, or has another key.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        former: str = "",
        collate: Callable[[Sequence[Conditioning]], Conditioning] = Conditioning.cat,
    ) -> None:
        self.folder, self.former = folder, former
        self._collate = collate
        index = self._read_index(key)
        try:
            self._take(index)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._damaged(f"{INDEX} is malformed ({error!r})") from error
        self.conditioning([None])  # opens the first prompt shard, so that damage is found early

    def _take(self, index: dict[str, Any]) -> None:
        self.fingerprint: str = index["key"]
        self.num_examples: int = index["num_examples"]
        self.has_losers: bool = index["has_losers"]
        self.latent_shapes: list[tuple[int, ...]] = [tuple(shape) for shape in index["latent_shapes"]]
        self.numbers: list[float | None] | None = index.get("numbers")
        self.ids: list[str] = index["ids"]
        self._prompt_rows: list[int] = index["prompt_rows"]
        self.prompts: list[str] = [index["prompts"][row] for row in self._prompt_rows]
        examples = counted(self.num_examples, "example", "examples")
        if self.numbers is not None and len(self.numbers) != self.num_examples:
            raise ValueError(f"{counted(len(self.numbers), 'number', 'numbers')} for {examples}")
        if not len(self.ids) == len(self.prompts) == self.num_examples:
            raise ValueError(f"{counted(len(self.ids), 'id', 'ids')} and {len(self.prompts)} prompts for {examples}")
        self.truncated: list[str] = index["truncated"]
        self.dropped = [Problem(*entry) for entry in index["dropped"]]
        # Older caches of clips have top-level entries for these two kinds; those of images may have no entry at all.
        remarks = dict(index.get("remarks") or {kind: index.get(kind, []) for kind in ("repeating", "closer")})
        self.remarks = {str(kind): [str(name) for name in names] for kind, names in remarks.items() if names}
        prompts = int(index["shard_size"])
        self._shard_sizes: dict[str, int] = {"prompts": prompts, "latents": index.get("latent_shard_size", prompts)}
        self._mapped: dict[str, dict[str, PackedRows]] = {}
        if min(self._shard_sizes.values()) < 1:
            raise ValueError(f"invalid shard sizes {self._shard_sizes}")

    def __len__(self) -> int:
        return self.num_examples

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The one shape that all latents have; raises DataError if they differ."""
        if len(self.latent_shapes) != 1:
            raise DataError(f"{self.folder} holds latents of {len(self.latent_shapes)} shapes; one shape is required")
        return self.latent_shapes[0]

    def winners(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Returns the winners' latents (B, *latent), which must have one shape; raises IndexError."""
        return self._stacked("winners", indices)

    def losers(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Returns the losers' latents (B, *latent); raises IndexError, or DataError if this cache has no losers."""
        if not self.has_losers:
            raise DataError(
                f"{self.folder} holds no losers: this data set has winners only, but the method needs labelled pairs. "
                "Use a data set with jpg_0, jpg_1, label_0 and label_1, or a method that needs winners only."
            )
        return self._stacked("losers", indices)

    def conditioning(self, indices: Sequence[int | None] | Tensor) -> Conditioning:
        """Returns B rows: each example's prompt embeddings, or the empty prompt's if the index is None.

        Raises:
            IndexError: an index is out of range.
            DataError: the cache is damaged.
        """
        known = self._rows([index for index in indices if index is not None])
        places = iter(known)
        rows = [0 if index is None else self._prompt_rows[next(places)] for index in indices] or [0]
        found = {name: self._gather("prompts", name, rows) for name in self._shard("prompts", 0)}
        stacked = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        if len(stacked) == len(found):
            return Conditioning(stacked).take(slice(0, len(indices)))
        singles = (dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True))
        made = [Conditioning({name: tensor[None] for name, tensor in single.items()}) for single in singles]
        try:
            return self._collate(made).take(slice(0, len(indices)))
        except ValueError as error:
            raise self._damaged(f"its prompt embeddings cannot be batched ({error})") from error

    def _stacked(self, name: str, indices: Sequence[int] | Tensor) -> Tensor:
        rows = self._rows(indices)
        found = self._gather("latents", name, rows or [0])
        return (found if isinstance(found, Tensor) else torch.stack(found))[: len(rows)]

    def _rows(self, indices: Sequence[int] | Tensor) -> list[int]:
        rows = [int(index) for index in indices]
        for row in rows:
            if not 0 <= row < self.num_examples:
                examples = counted(self.num_examples, "example", "examples")
                raise IndexError(f"index {row} is out of range for a cache of {examples}")
        return rows

    def _gather(self, stem: str, name: str, rows: Sequence[int]) -> Tensor | list[Tensor]:
        """Returns the requested rows of one tensor name, which is split over shards of `_shard_sizes[stem]` rows.

        Rows of one shape are copied into one tensor, with one copy per shard: copying row by row would start a parallel
        region for each row. Rows of different shapes are returned as a list of views.
        """
        size = self._shard_sizes[stem]
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row // size, []).append(place)
        held: dict[int, PackedRows] = {}
        for shard, here in places.items():
            packed, last = self._shard(stem, shard).get(name), max(rows[place] % size for place in here)
            if packed is None or last >= len(packed):
                raise self._damaged(f"{stem}-{shard:05d}.safetensors: {name} has no row {last}")
            held[shard] = packed
        blocks = {shard: packed.block for shard, packed in held.items()}
        shapes = {None if block is None else block.shape[1:] for block in blocks.values()}
        if None in shapes or len(shapes) > 1:
            return [held[row // size][row % size] for row in rows]
        first = next(block for block in blocks.values() if block is not None)
        out = first.new_empty((len(rows), *first.shape[1:]))
        for shard, here in places.items():
            block = blocks[shard]
            assert block is not None
            out[torch.tensor(here)] = block[torch.tensor([rows[place] % size for place in here])]
        return out

    def _shard(self, stem: str, shard: int) -> dict[str, PackedRows]:
        """Returns a shard's rows by tensor name, memory-mapped: pages are read from disk when rows are used."""
        file_name = f"{stem}-{shard:05d}.safetensors"
        if file_name not in self._mapped:
            try:
                with safe_open(self.folder / file_name, framework="pt") as file:
                    rows = {
                        name: PackedRows(file.get_tensor(name), file.get_tensor(PackedRows.table(name)))
                        for name in PackedRows.names(file.keys())
                    }
                    if not rows:
                        raise ValueError("it holds no tensors")
                    for name in rows if stem == "latents" else ():
                        self._check_latents(name, rows[name], file.get_tensor(name))
            except (OSError, SafetensorError, ValueError) as error:
                raise self._damaged(f"{file_name}: {error}") from error
            self._mapped[file_name] = rows
        return self._mapped[file_name]

    def _check_latents(self, name: str, rows: PackedRows, values: Tensor) -> None:
        other = rows.distinct() - set(self.latent_shapes)
        if other or not values.is_floating_point():
            raise ValueError(f"{name} has unexpected shapes {sorted(other)} or dtype {values.dtype}")

    def _read_index(self, key: str) -> dict[str, Any]:
        """Returns the index after checking its version, its key and every file's size."""
        try:
            index = read_json(self.folder / INDEX, most=1 << 32)
            sizes = {name: (self.folder / name).stat().st_size for name in index["files"]}
            if index["format_version"] != FORMAT_VERSION or index["key"] != key:
                raise self._damaged(f"{INDEX} belongs to another cache")
        except OSError as error:
            raise self._damaged(f"{error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"{INDEX} is malformed ({error!r})") from error
        for name, size in index["files"].items():
            if sizes[name] != size:
                raise self._damaged(f"{name} has {sizes[name]} bytes instead of {size}")
        return index

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.folder}: this cache is damaged: {reason}. Delete the folder; it is then rebuilt.")
