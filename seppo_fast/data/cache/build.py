"""Encodes a data set into the files of a latent cache, shard by shard, so that at most one shard is in memory."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from seppo_fast.data.cache.latents import FORMAT_VERSION, INDEX
from seppo_fast.data.cache.rows import pack
from seppo_fast.data.examples import Example, Problem, Source, counted, printable
from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.images import Opened, decode_image, fit_square
from seppo_fast.data.remarks import Remarks
from seppo_fast.data.scan import Decode, decode_all
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.utils.errors import DataError, NonFiniteError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.logging import say
from seppo_fast.utils.progress import progress

SHARD_SIZE = 1024
CLIP_SHARD_BYTES = 1 << 27
"""Limit on a shard of clips: 1024 clips of 16 frames at 512 x 512 take half a GiB, and twice that during writing."""
BATCH = 8
"""The number of images encoded at once."""
MAX_LISTED = 20


class Encoder(Protocol):
    """The part of a model family's interface that `seppo_fast.data` uses."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes uint8 images (B, H, W, 3) or clips (B, F, H, W, 3).

        Returns:
            Scaled latents (B, *latent), in the dtype to be stored.
        """

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        """Returns one row per prompt, with tensors in the dtypes to be stored."""

    def collate(self, rows: Sequence[Conditioning]) -> Conditioning:
        """Combines single rows into one batch."""

    def too_long(self, prompts: list[str]) -> list[str]:
        """Returns the prompts that `encode_prompts` truncates."""

    def fingerprint(self) -> dict[str, str]:
        """Returns everything in the model that affects what is stored, such as digests of its files and the dtype."""


def build(
    source: Source,
    encoder: Encoder,
    folder: Path,
    key: str,
    resolution: int,
    batch_size: int,
    losers: bool,
    frames: int | None,
    flip: bool,
) -> None:
    """Writes a complete cache into the existing, empty `folder`; see `open_or_build` for arguments and exceptions."""
    total = len(source) + len(source.problems)
    if total == 0:
        raise DataError(f"{source.spec}: contains no examples{''.join(f'; {note}' for note in source.notes)}.")
    size = f"{resolution} x {resolution}" if frames is None else f"{frames} x {resolution} x {resolution}"
    say(f"{printable(source.spec)}: encoding {counted(len(source), 'example', 'examples')} at {size}")
    for note in source.notes:
        say(note)
    problems = list(source.problems)
    for problem in problems if not too_many(problems, total) else ():
        say(f"left out: {problem}")
    remarks = Remarks(resolution)
    decode = _to_square(resolution, remarks) if frames is None else _to_clip(resolution, frames, flip, remarks)
    batch_size = encoded_at_once(frames, batch_size)
    writer = _Writer(source, encoder, folder, losers, clips=frames is not None)
    batch: list[tuple[Example, list[np.ndarray]]] = []
    with progress(len(source), "encoded", "examples") as advance:
        for example, outcome in decode_all(source, decode, losers):
            if isinstance(outcome, Problem):
                problems.append(outcome)
                if not too_many(problems, total):
                    say(f"left out: {outcome}")
            else:
                batch.append((example, outcome))
            if len(batch) == batch_size:
                # Past the limit no cache is written, but the list of bad examples is still completed.
                if not too_many(problems, total):
                    writer.add(batch)
                batch = []
            advance(1)
        if too_many(problems, total):
            raise DataError(_bad_list(source, problems, total))
        if batch:
            writer.add(batch)
    writer.finish(key, problems, remarks)


def encoded_at_once(frames: int | None, images: int = BATCH) -> int:
    """Returns how many examples are encoded at once: `images`, or `max(1, images // frames)` clips."""
    return images if frames is None else max(1, images // frames)


def _to_square(resolution: int, remarks: Remarks) -> Decode[np.ndarray]:
    def decode(example: Example, name: str, opened: Opened) -> np.ndarray:
        image = decode_image(name, opened)
        remarks.see(example, name, image.size)
        return fit_square(image, resolution)

    return decode


def _to_clip(resolution: int, frames: int, flip: bool, remarks: Remarks) -> Decode[np.ndarray]:
    def decode(example: Example, name: str, opened: Opened) -> np.ndarray:
        clip = load_clip(example, name, opened, resolution, frames, flip)
        remarks.see_clip(example, name, clip)
        return clip.pixels

    return decode


def too_many(problems: Sequence[Problem], total: int) -> bool:
    """Returns whether more than 1 % of `total` examples have problems, so that no cache is built from the others."""
    return len(problems) * 100 > total


def _bad_list(source: Source, problems: list[Problem], total: int) -> str:
    examples = counted(total, "example", "examples")
    lines = [f"{source.spec}: {len(problems)} of {examples} cannot be used, more than 1 %:"]
    lines += [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  and {len(problems) - MAX_LISTED} more")
    lines.append("Fix or remove them.")
    return "\n".join(lines)


class _Writer:
    """Encodes batches of examples and writes shards: latents per example, prompt embeddings per distinct prompt."""

    def __init__(self, source: Source, encoder: Encoder, folder: Path, losers: bool, clips: bool) -> None:
        self._source, self._encoder, self._folder, self._losers = source, encoder, folder, losers
        self._clips = clips
        self._latents = _Shards(folder, "latents", self._write, CLIP_SHARD_BYTES if clips else None)
        self._conditions = _Shards(folder, "prompts", self._write, None)
        self._latent_shapes: dict[tuple[int, ...], None] = {}
        self._numbers: list[float | None] = []
        self._ids: list[str] = []
        self._prompt_rows: list[int] = []
        self._prompts: dict[str, int] = {}
        self._truncated: list[str] = []
        self._needed = 0
        self._add_prompts([""])

    def add(self, batch: list[tuple[Example, list[np.ndarray]]]) -> None:
        """Encodes and stores a batch of examples.

        Args:
            batch: each example with its decoded images or clips, winner first, then the loser if losers are encoded;
                each has the shape (height, width, 3) or (frames, height, width, 3).

        Raises:
            DataError: no space is left.
            NonFiniteError: a latent or a prompt embedding is not finite.
        """
        names = [example.id for example, _ in batch]
        tensors = {}
        for place, role in enumerate(("winners", "losers") if self._losers else ("winners",)):
            images = torch.from_numpy(np.stack([images[place] for _, images in batch]))
            tensors[role] = _checked(self._encoder.encode_images(images), f"latents of {printable(', '.join(names))}")
            assert len(tensors[role]) == len(batch), "encode_images must return one latent per image or clip"
        prompts = dict.fromkeys(example.prompt for example, _ in batch)
        self._add_prompts([prompt for prompt in prompts if prompt not in self._prompts])
        self._latent_shapes |= {tuple(latents.shape[1:]): None for latents in tensors.values()}
        self._numbers += [example.number for example, _ in batch]
        if not self._needed:
            self._check_space(sum(tensor[0].nbytes for tensor in tensors.values()))
        self._latents.append(tensors)
        self._ids += names
        self._prompt_rows += [self._prompts[example.prompt] for example, _ in batch]

    def _add_prompts(self, prompts: list[str]) -> None:
        if prompts:
            rows = self._encoder.encode_prompts(prompts)
            assert len(rows) == len(prompts), "encode_prompts must return one row per prompt"
            for row in rows:
                tensors = {name: _checked(tensor, f"{name} of {prompts}") for name, tensor in row.items()}
                self._conditions.append(tensors)
            self._truncated += self._encoder.too_long(prompts)
            first = len(self._prompts)
            self._prompts.update((prompt, first + place) for place, prompt in enumerate(prompts))
            self._prompt_bytes = sum(tensor[0].nbytes for tensor in rows[0].values())

    def _check_space(self, example_bytes: int) -> None:
        """Raises a DataError right at the start if the disk cannot hold the whole cache, not hours later."""
        unique = len({example.prompt for example in self._source}) + 1
        self._needed = example_bytes * len(self._source) + self._prompt_bytes * unique
        if shutil.disk_usage(self._folder).free < self._needed:
            raise self._no_space()

    def _no_space(self) -> DataError:
        free = shutil.disk_usage(self._folder).free
        return DataError(
            f"no space left for the cache in {self._folder.parent}: {self._needed / 2**20:.1f} MiB needed, "
            f"{free / 2**20:.1f} MiB free. Make room, or set data.cache to a folder on another disk."
        )

    def _write(self, path: Path, content: bytes) -> None:
        try:
            write_file(path, content)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space() from error
            raise

    def finish(self, key: str, problems: list[Problem], remarks: Remarks) -> None:
        """Writes the last shards and the index, whose entries for numbers, clips and remarks are optional."""
        self._latents.close()
        self._conditions.close()
        index = {
            "format_version": FORMAT_VERSION,
            "key": key,
            "num_examples": len(self._ids),
            "has_losers": self._losers,
            "latent_shapes": list(self._latent_shapes),
            "shard_size": SHARD_SIZE,
            "files": {path.name: path.stat().st_size for path in sorted(self._folder.iterdir())},
            "dropped": [(problem.id, problem.reason) for problem in problems],
            "truncated": self._truncated,
            "prompts": list(self._prompts),
            "prompt_rows": self._prompt_rows,
            "ids": self._ids,
        }
        if any(number is not None for number in self._numbers):
            index["numbers"] = self._numbers
        if self._clips:
            index["latent_shard_size"] = self._latents.size
        if found := remarks.of(self._ids):
            index["remarks"] = found
        self._write(self._folder / INDEX, json.dumps(index, indent=0).encode())


class _Shards:
    """Collects rows of named tensors and writes a shard once it has `size` rows.

    Attributes:
        size: rows per shard: `SHARD_SIZE`, or with a limit as many as fit into its bytes.

    Args:
        folder: the folder to write to.
        stem: the beginning of the file names.
        write: writes one file.
        limit: the most bytes per shard, or None.
    """

    def __init__(self, folder: Path, stem: str, write: Callable[[Path, bytes], None], limit: int | None) -> None:
        self._folder, self._stem, self._write, self._limit = folder, stem, write, limit
        self.size = SHARD_SIZE
        self._held: list[dict[str, Tensor]] = []
        self._written = 0

    def append(self, tensors: dict[str, Tensor]) -> None:
        for row in _split_rows(tensors):
            if self._limit is not None:
                self.size = max(1, min(SHARD_SIZE, self._limit // sum(tensor.nbytes for tensor in row.values())))
            self._held.append(row)
            if len(self._held) == self.size:
                self.close()

    def close(self) -> None:
        """Writes the rows held, if any, as the next shard."""
        if self._held:
            path = self._folder / f"{self._stem}-{self._written:05d}.safetensors"
            self._write(path, save(pack(self._held)))
            self._written += 1
            self._held = []


def _split_rows(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for row in range(len(next(iter(tensors.values())))):
        yield {name: tensor[row] for name, tensor in tensors.items()}


def _checked(encoded: Tensor, what: str) -> Tensor:
    """Returns an encoder's output on the CPU; raises if it is not finite, as when a half-precision VAE overflows."""
    encoded = encoded.detach().cpu()
    if encoded.is_floating_point() and not torch.isfinite(encoded).all():
        raise NonFiniteError(f"the {what} are not finite. Set model.precision to fp32 or use another VAE.")
    return encoded


def write_file(path: Path, content: bytes) -> None:
    """Writes one file; every file of a cache is written through this function."""
    fault("cache-write")
    path.write_bytes(content)
