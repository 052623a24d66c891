"""A finished latent cache: the winners, losers and prompt embeddings that training reads, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seppo_fast.data.examples import Problem
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.files import read_json

FORMAT_VERSION = 2
INDEX = "index.json"


class LatentCache:
    """Random access to a finished cache; rows are copied out, in the dtype they were stored in.

    Attributes:
        ids: Each example's id, in order.
        prompts: Each example's prompt, in order.
        num_examples: How many; also `len(cache)`.
        has_losers: Whether `losers` may be called.
        latent_shape: Shape of one latent, such as (4, 64, 64), or (4, 16, 32, 32) of a clip.
        fingerprint: The full key, sha256 in hex: equal exactly for equal content.
        truncated: Prompts of which the text encoder sees only the beginning.
        dropped: The examples left out while building, each with its reason.
        remarks: By kind the names of images and clips that are used all the same; see `remarks.remark_lines`.
        uncond_embeds: (1, L, D), the embedding of the empty prompt.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Opens a cache folder; raises DataError unless it is complete and has this key."""
        self.folder = folder
        index = self._read_index(key)
        try:
            self._take(index)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._damaged(f"{INDEX} is not readable ({error!r})") from error
        self.uncond_embeds = self._gather("prompts", "embeds", [0])

    def _take(self, index: dict[str, Any]) -> None:
        self.fingerprint: str = index["key"]
        self.num_examples: int = index["num_examples"]
        self.has_losers: bool = index["has_losers"]
        self.latent_shape: tuple[int, ...] = tuple(index["latent_shape"])
        self.ids: list[str] = index["ids"]
        self._prompt_rows: list[int] = index["prompt_rows"]
        self.prompts: list[str] = [index["prompts"][row] for row in self._prompt_rows]
        if not len(self.ids) == len(self.prompts) == self.num_examples:
            raise ValueError(f"{len(self.ids)} ids and {len(self.prompts)} prompts of {self.num_examples} examples")
        self.truncated: list[str] = index["truncated"]
        self.dropped = [Problem(*entry) for entry in index["dropped"]]
        # Caches of clips had entries of their own for these two; those of images may have none.
        remarks = dict(index.get("remarks") or {kind: index.get(kind, []) for kind in ("repeating", "closer")})
        self.remarks = {str(kind): [str(name) for name in names] for kind, names in remarks.items() if names}
        embeds = int(index["shard_size"])
        self._shard_sizes: dict[str, int] = {"prompts": embeds, "latents": index.get("latent_shard_size", embeds)}
        self._mapped: dict[tuple[str, str], Tensor] = {}
        if min(self._shard_sizes.values()) < 1:
            raise ValueError(f"shards of {self._shard_sizes} rows")

    def __len__(self) -> int:
        return self.num_examples

    def winners(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Latents (B, *latent) of the winners; raises IndexError."""
        return self._gather("latents", "winners", self._rows(indices))

    def losers(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Latents (B, *latent) of the losers; raises IndexError, and DataError if this cache has none."""
        if not self.has_losers:
            raise DataError(
                f"{self.folder} holds no losers: this data set has winners only, and the method asks for labelled "
                "pairs. Use a data set with jpg_0, jpg_1, label_0, label_1, or a method that needs winners only."
            )
        return self._gather("latents", "losers", self._rows(indices))

    def prompt_embeds(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Embeddings (B, L, D) of the examples' prompts; raises IndexError."""
        return self._gather("prompts", "embeds", [self._prompt_rows[row] for row in self._rows(indices)])

    def _rows(self, indices: Sequence[int] | Tensor) -> list[int]:
        rows = [int(index) for index in indices]
        for row in rows:
            if not 0 <= row < self.num_examples:
                raise IndexError(f"index {row} is out of range for a cache of {self.num_examples} examples")
        return rows

    def _gather(self, stem: str, name: str, rows: Sequence[int]) -> Tensor:
        """Rows of one tensor that is split over shards of `_shard_sizes[stem]` rows."""
        size = self._shard_sizes[stem]
        first = self._map(stem, name, 0)
        out = first.new_empty((len(rows), *first.shape[1:]))
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row // size, []).append(place)
        for shard, here in places.items():
            inside = torch.tensor([rows[place] % size for place in here])
            out[torch.tensor(here)] = self._map(stem, name, shard)[inside]
        return out

    def _map(self, stem: str, name: str, shard: int) -> Tensor:
        """The shard's tensor as a view of the file: pages are read when rows are taken."""
        key = (f"{stem}-{shard:05d}.safetensors", name)
        if key not in self._mapped:
            try:
                with safe_open(self.folder / key[0], framework="pt") as file:
                    tensor = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise self._damaged(f"{key[0]}: {error}") from error
            expected = self.latent_shape if stem == "latents" else tuple(tensor.shape[1:])
            if not tensor.is_floating_point() or tuple(tensor.shape[1:]) != expected:
                raise self._damaged(f"{key[0]}: {name} is {tuple(tensor.shape)} {tensor.dtype}")
            self._mapped[key] = tensor
        return self._mapped[key]

    def _read_index(self, key: str) -> dict[str, Any]:
        """The index, once its version, its key and every file's size are as they should be."""
        try:
            index = read_json(self.folder / INDEX, most=1 << 32)
            sizes = {name: (self.folder / name).stat().st_size for name in index["files"]}
            if index["format_version"] != FORMAT_VERSION or index["key"] != key:
                raise self._damaged(f"{INDEX} belongs to another cache")
        except OSError as error:
            raise self._damaged(f"{error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"{INDEX} is not readable ({error!r})") from error
        for name, size in index["files"].items():
            if sizes[name] != size:
                raise self._damaged(f"{name} has {sizes[name]} bytes instead of {size}")
        return index

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.folder}: this cache is damaged, {reason}. Delete the folder; it is then made again.")
