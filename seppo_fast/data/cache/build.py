"""Encodes a source into the files of a latent cache, shard by shard, so that no more than one shard is in memory."""

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
from seppo_fast.data.examples import Example, Problem, Source, printable
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
"""Clips fill a shard sooner: 1024 of 16 frames at 512 x 512 are half a GiB, and twice that while one is written."""
BATCH = 8
"""Images encoded at once."""
MAX_LISTED = 20


class Encoder(Protocol):
    """What a model family offers the data room."""

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3), of clips (B, F, H, W, 3), to scaled latents (B, *latent) in the dtype to be stored."""

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        """One row for each prompt, its tensors in the dtypes to be stored."""

    def collate(self, rows: Sequence[Conditioning]) -> Conditioning:
        """Single rows to one batch."""

    def too_long(self, prompts: list[str]) -> list[str]:
        """Those of the prompts of which `encode_prompts` sees only the beginning."""

    def fingerprint(self) -> dict[str, str]:
        """Everything of the model that changes what is stored: digests of its files, the dtype."""


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
    """Writes a whole cache into the existing, empty `folder`; see `open_or_build` for the rest and the errors."""
    total = len(source) + len(source.problems)
    if total == 0:
        raise DataError(f"{source.spec}: no examples in it{''.join(f'; {note}' for note in source.notes)}.")
    size = f"{resolution} x {resolution}" if frames is None else f"{frames} x {resolution} x {resolution}"
    say(f"{printable(source.spec)}: encoding {len(source)} examples at {size}")
    for note in source.notes:
        say(note)
    problems = list(source.problems)
    for problem in problems if not _too_many(problems, total) else ():
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
                if not _too_many(problems, total):
                    say(f"left out: {outcome}")
            else:
                batch.append((example, outcome))
            if len(batch) == batch_size:
                # past the limit there will be no cache, but the list of bad examples is worth completing
                if not _too_many(problems, total):
                    writer.add(batch)
                batch = []
            advance(1)
        if _too_many(problems, total):
            raise DataError(_bad_list(source, problems, total))
        if batch:
            writer.add(batch)
    writer.finish(key, problems, remarks)


def encoded_at_once(frames: int | None, images: int = BATCH) -> int:
    """Returns how many examples are encoded at once: `images`, or clips of that many frames in all, at least one."""
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


def _too_many(problems: list[Problem], total: int) -> bool:
    """More than 1 % of `total` examples."""
    return len(problems) * 100 > total


def _bad_list(source: Source, problems: list[Problem], total: int) -> str:
    lines = [f"{source.spec}: {len(problems)} of {total} examples cannot be used, more than 1 %:"]
    lines += [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  and {len(problems) - MAX_LISTED} more")
    lines.append("Mend or remove them.")
    return "\n".join(lines)


class _Writer:
    """Encodes batches of examples and lays them out: latents by example, conditions by unique prompt."""

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
        """Encodes one batch of decoded examples: the winner, then the loser, each (*frames, height, width, 3)."""
        names = [example.id for example, _ in batch]
        tensors = {}
        for place, role in enumerate(("winners", "losers") if self._losers else ("winners",)):
            images = torch.from_numpy(np.stack([images[place] for _, images in batch]))
            tensors[role] = _checked(self._encoder.encode_images(images), f"latents of {printable(', '.join(names))}")
            assert len(tensors[role]) == len(batch), "encode_images must return one latent an image"
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
            assert len(rows) == len(prompts), "encode_prompts must return one row a prompt"
            for row in rows:
                tensors = {name: _checked(tensor, f"{name} of {prompts}") for name, tensor in row.items()}
                self._conditions.append(tensors)
            self._truncated += self._encoder.too_long(prompts)
            first = len(self._prompts)
            self._prompts.update((prompt, first + place) for place, prompt in enumerate(prompts))
            self._prompt_bytes = sum(tensor[0].nbytes for tensor in rows[0].values())

    def _check_space(self, example_bytes: int) -> None:
        """Refuses to begin what the disk cannot hold, hours before it would find out."""
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
        """Writes the last shards and the index, with an entry more for clips, and one where there are remarks."""
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
    """Rows of named tensors, written whenever `size` of them are together: `SHARD_SIZE`, or what `limit` bytes hold."""

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
    """On the CPU, and finite: a half-precision VAE that overflows must not turn into training data."""
    encoded = encoded.detach().cpu()
    if encoded.is_floating_point() and not torch.isfinite(encoded).all():
        raise NonFiniteError(f"the {what} are not finite. Set model.precision to fp32 or use another VAE.")
    return encoded


def write_file(path: Path, content: bytes) -> None:
    """All writing of cache files goes through here."""
    fault("cache-write")
    path.write_bytes(content)
