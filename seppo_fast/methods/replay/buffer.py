"""The samples of a run so far, as files that all of its processes read.

    state/.buffer/samples-000010-000020-1-of-2.safetensors     rank 1's share of the samples for updates 10 to 19

The numbers in a name are the first update, the one after the last, the writer's rank and the number of processes. Each
saved state holds hard links to these files, with checksums. A run that resumes takes them from its state, so what a
killed process left here does no harm.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seppo_fast.distributed.processes import Processes
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import disk_message, link_or_copy

_NAME = re.compile(r"samples-(\d{6,})-(\d{6,})-(\d+)-of-(\d+)\.safetensors")
_LATENTS = "latents"


class Key(NamedTuple):
    """A sample's key.

    Attributes:
        update: the update that it was generated for.
        place: its place among that update's samples, in the order of their ids over all processes.
    """

    update: int
    place: int


class SampleBuffer:
    """Latents by key. A window of updates is written at once, each process its share, dealt round-robin.

    Args:
        folder: the folder of the files; what it holds is removed when a run writes its first window.
        per_update: number of samples per update.
        latent_shape: the shape of one sample.
        processes: the run's processes; all must call `write` and `restore` together.
    """

    def __init__(self, folder: Path, per_update: int, latent_shape: Sequence[int], processes: Processes) -> None:
        self._folder = folder
        self._per_update = per_update
        self._shape = tuple(latent_shape)
        self._processes = processes
        self._windows: dict[range, list[Path]] = {}
        self._shares: dict[Path, Tensor] = {}

    def __contains__(self, update: int) -> bool:
        """Returns whether the samples of an update have been written."""
        return any(update in window for window in self._windows)

    def share(self, window: range) -> list[Key]:
        """Returns the keys of the samples of a window that this process writes, in order."""
        keys = [Key(update, place) for update in window for place in range(self._per_update)]
        return keys[self._processes.rank :: self._processes.world]

    def write(self, window: range, latents: Tensor) -> None:
        """Writes this process's share of a window, `(len(self.share(window)), *latent)` float32 on the CPU.

        Raises:
            CheckpointError: the disk refuses the write.
        """
        if not self._windows:
            self._clear()
        world = self._processes.world
        files = [
            self._folder / f"samples-{window.start:06d}-{window.stop:06d}-{rank}-of-{world}.safetensors"
            for rank in range(world)
        ]
        try:
            save_file({_LATENTS: latents.contiguous()}, files[self._processes.rank])
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(disk_message(files[self._processes.rank], problem)) from problem
        self._processes.barrier(patient=True)  # the other shares may take longer to generate
        self._windows[window] = files

    def read(self, keys: Sequence[Key]) -> Tensor:
        """Returns samples `(len(keys), *latent)` float32, of any process.

        Raises:
            KeyError: a sample has not been written.
            CheckpointError: a file is missing or damaged.
        """
        rows = [self._row(key) for key in keys]
        return torch.stack(rows) if rows else torch.empty((0, *self._shape))

    def files(self) -> dict[str, Path]:
        """Returns all files by name; none of them ever changes."""
        return {file.name: file for files in self._windows.values() for file in files}

    def restore(self, state: Path) -> None:
        """Replaces everything by the files of a saved state, whose checksums must have been checked.

        Raises:
            CheckpointError: a share is missing there, or the disk refuses a file.
        """
        found: dict[range, dict[int, str]] = {}
        for name in sorted(file.name for file in state.iterdir()):
            if match := _NAME.fullmatch(name):
                first, stop, rank, world = (int(number) for number in match.groups())
                found.setdefault(range(first, stop), dict.fromkeys(range(world), ""))[rank] = name
        if lacking := [window for window, names in found.items() if "" in names.values()]:
            raise CheckpointError(
                f"{state}: samples of updates {lacking[0].start + 1} to {lacking[0].stop} are missing"
            )
        self._clear()
        self._windows = {window: [self._folder / name for name in names.values()] for window, names in found.items()}
        if self._processes.main:
            for name, file in self.files().items():
                try:
                    link_or_copy(state / name, file)
                except OSError as problem:
                    raise CheckpointError(disk_message(file, problem)) from problem
        self._processes.barrier()

    def _clear(self) -> None:
        self._windows, self._shares = {}, {}
        if self._processes.main:
            try:
                if self._folder.exists():
                    shutil.rmtree(self._folder)
                self._folder.mkdir(parents=True)
            except OSError as problem:
                raise CheckpointError(disk_message(self._folder, problem)) from problem
        self._processes.barrier()

    def _row(self, key: Key) -> Tensor:
        window = next((window for window in self._windows if key.update in window), None)
        if window is None:
            raise KeyError(f"no samples of update {key.update} have been written")
        files = self._windows[window]
        row, rank = divmod((key.update - window.start) * self._per_update + key.place, len(files))
        return self._opened(files[rank])[row]

    def _opened(self, file: Path) -> Tensor:
        """Returns the latents of a file, memory-mapped."""
        if file not in self._shares:
            try:
                latents = load_file(file)[_LATENTS]
            except (OSError, SafetensorError, KeyError) as problem:
                raise CheckpointError(f"{file}: cannot be read: {problem}") from problem
            if latents.shape[1:] != self._shape or latents.dtype != torch.float32:
                raise CheckpointError(f"{file}: holds {tuple(latents.shape)} {latents.dtype}, not this run's samples")
            self._shares[file] = latents
        return self._shares[file]
