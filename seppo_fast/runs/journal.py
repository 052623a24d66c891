"""The log of a run: one printed line per update for people, one JSON line per update for programs."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from seppo_fast.runs.watch import HealthWatch
from seppo_fast.utils.progress import duration

LOG, SKIPPED = "log.jsonl", "skipped.jsonl"
_GIB = 2**30
_ETA_UPDATES = 10  # the remaining time is estimated from this many updates


class Journal:
    """Writes `log.jsonl` in the run's folder, one object per update, and prints one line per update.

    Args:
        folder: the run's folder.
        updates: total number of updates.
        pairs_per_update: number of pairs per update, for the pairs per second.
        device: the device whose peak memory is reported.
        unit: what `pairs_per_update` counts; see `Objective.unit`.
    """

    def __init__(
        self, folder: Path, updates: int, pairs_per_update: int, device: torch.device, unit: str = "pairs"
    ) -> None:
        self._folder = folder
        self._updates = updates
        self._pairs = pairs_per_update
        self._device = device
        self._unit = unit
        self._waiting = b""
        self._watch = HealthWatch()
        self._seconds: deque[float] = deque(maxlen=_ETA_UPDATES)

    def resume(self, finished: int) -> None:
        """Drops the log lines of updates after `finished`, which will be made again, and an incomplete last line."""
        for name in (LOG, SKIPPED):
            file = self._folder / name
            if not file.exists():
                continue
            kept = [entry for entry in _entries(file) if entry["update"] <= finished]
            staging = file.with_name(f".tmp-{name}")
            staging.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
            os.replace(staging, file)
            if name == LOG:
                for entry in kept:
                    self._watch.update(entry)

    def format(self, number: int, stats: dict[str, float]) -> dict[str, float]:
        """Prints the line of update `number` (from 1), and a warning for each health rule whose spell begins with it.

        Args:
            number: number of the update.
            stats: the learner's means, `rollout_seconds` and `learn_seconds`.

        Returns:
            `stats` with the total seconds, pairs per second, peak memory in GiB and the flags of the health rules.
        """
        stats = stats | {"seconds": stats["rollout_seconds"] + stats["learn_seconds"]}
        stats |= {"pairs_per_second": self._pairs / stats["seconds"], "memory_gib": peak_memory_gib(self._device)}
        self._seconds.append(stats["seconds"])
        # The median, because the first update compiles and measures, and a shared machine stalls now and then.
        left = (self._updates - number) * statistics.median(self._seconds)
        print(progress_line(number, self._updates, stats, left, self._unit), flush=True)
        for rule in self._watch.update(stats):
            print(rule.warning, flush=True)
        return stats | self._watch.flags(stats)

    def append(self, number: int, stats: dict[str, float]) -> None:
        """Appends to `log.jsonl` what `format` returned for update `number`.

        Raises:
            OSError: the line cannot be written; the next call writes it together with its own.
        """
        # JSON has no NaN: non-finite values are logged as null (the printed line shows them).
        finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
        self._waiting += json.dumps({"update": number} | finite).encode() + b"\n"
        _append(self._folder / LOG, self._waiting)
        self._waiting = b""

    def skipped(self, number: int, sample_ids: Sequence[int], searching: bool) -> None:
        """Records in `skipped.jsonl` the pairs of an update that was skipped because its gradient was not finite.

        Args:
            number: number of the update, from 1.
            sample_ids: the pairs' sample ids, from all processes; see `Pairs`.
            searching: whether the gradient scaler was still searching for its scale, in which case the pairs are not
                to blame.

        Raises:
            OSError: the line cannot be written.
        """
        line = {"update": number, "scaler_searching": searching, "sample_ids": list(sample_ids)}
        _append(self._folder / SKIPPED, json.dumps(line).encode() + b"\n")


def _append(file: Path, lines: bytes) -> None:
    """Appends all of the lines or none of them."""
    with file.open("ab", buffering=0) as opened:
        size = opened.tell()
        if opened.write(lines) < len(lines):
            os.ftruncate(opened.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Returns the logged updates of a run, in order; non-finite values are None."""
    return list(_entries(folder / LOG))


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return  # a killed process wrote only half of this line
        if not isinstance(entry, dict) or not isinstance(entry.get("update"), int):
            return
        yield entry


def progress_line(number: int, updates: int, stats: dict[str, float], seconds_left: float, unit: str = "pairs") -> str:
    """Returns the printed line of an update.

    `update 12/210  loss 0.6903  winner 0.1312 (ref 0.1314)  reject 0.61  |grad| 0.42  2.3 pairs/s  eta 13 m  ...`

    Objectives that learn from a reward have, in place of errors and rejected pairs, the mean and standard deviation of
    their iteration's rewards and the share of samples that teach anything: `reward 21.34 (sd 0.9)  kept 0.94`.
    """
    parts = [f"update {number}/{updates}", f"loss {stats['loss']:.4f}"]
    if "sft_loss" in stats:
        parts[-1] += f" ({stats['preference_loss']:.4f} preference)"
    if "reward_mean" in stats:
        parts.append(f"reward {stats['reward_mean']:.4g} (sd {stats['reward_std']:.2g})")
    if "kept" in stats:
        parts.append(f"kept {stats['kept']:.2f}")
    if "winner_error" in stats:
        reference = f" (ref {stats['ref_winner_error']:.4f})" if "ref_winner_error" in stats else ""
        parts.append(f"winner {stats['winner_error']:.4f}{reference}")
    if "aaf_rate" in stats:
        parts.append(f"reject {stats['aaf_rate']:.2f}")
    why = f"not finite, samples in {SKIPPED}" if stats.get("rows") != 0 else "nothing to learn from"
    parts.append(f"|grad| {stats['grad_norm']:.2f}" + (f" SKIPPED: {why}" if stats["skipped"] else ""))
    parts.append(f"{stats['pairs_per_second']:.3g} {unit}/s")
    parts.append(f"eta {duration(seconds_left)}")
    parts.append(f"{stats['memory_gib']:.1f} GB")
    return "  ".join(parts)


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of a GPU in GiB, or the peak resident memory of the process for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
