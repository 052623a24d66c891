"""What a run says while it runs: a line for people, a JSON line for programs."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_GIB = 2**30


class Journal:
    """Writes `log.jsonl` in the run's folder, one object per update, and prints one line per update.

    Args:
        folder: of the run.
        updates: in all.
        pairs_per_update: for the rate.
    """

    def __init__(self, folder: Path, updates: int, pairs_per_update: int) -> None:
        self._file = folder / "log.jsonl"
        self._updates = updates
        self._pairs = pairs_per_update
        self._waiting = b""

    def resume(self, finished: int) -> None:
        """Drops what was written of updates after `finished`, which will come again, and a line that broke off."""
        if not self._file.exists():
            return
        kept = [json.dumps(entry) + "\n" for entry in _entries(self._file) if entry["update"] <= finished]
        staging = self._file.with_name(".tmp-log.jsonl")
        staging.write_text("".join(kept), encoding="utf-8")
        os.replace(staging, self._file)

    def update(self, number: int, stats: dict[str, float]) -> None:
        """Records update `number` (from 1); `stats` holds the learner's means and the seconds of both phases.

        Raises:
            OSError: the disk refuses; the line is written with the next one.
        """
        stats["seconds"] = stats["rollout_seconds"] + stats["learn_seconds"]
        stats = stats | {"pairs_per_second": self._pairs / stats["seconds"], "memory_gib": peak_memory_gib()}
        print(progress_line(number, self._updates, stats), flush=True)
        # JSON has no NaN: what is not finite is null there, and printed as it is.
        finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
        self._waiting += json.dumps({"update": number} | finite).encode() + b"\n"
        with self._file.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(self._waiting) < len(self._waiting):
                os.ftruncate(file.fileno(), size)  # no half lines; these come with the next ones
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting = b""


def read_journal(folder: Path) -> list[dict[str, float]]:
    """The updates of a run, in order."""
    return list(_entries(folder / "log.jsonl"))


def _entries(file: Path) -> Iterator[dict[str, float]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return  # a killed process wrote half of it
        if not isinstance(entry, dict) or not isinstance(entry.get("update"), int):
            return
        yield entry


def progress_line(number: int, updates: int, stats: dict[str, float]) -> str:
    """`update 12/210  loss 0.6903  winner 0.1312 (ref 0.1314)  reject 0.61  |grad| 0.42  2.3 pairs/s  eta 13 m  ...`"""
    parts = [f"update {number}/{updates}", f"loss {stats['loss']:.4f}"]
    winner = f"winner {stats['winner_error']:.4f}"
    if "aaf_rate" in stats:
        parts += [f"{winner} (ref {stats['ref_winner_error']:.4f})", f"reject {stats['aaf_rate']:.2f}"]
    else:
        parts.append(winner)
    parts.append(f"|grad| {stats['grad_norm']:.2f}" + (" SKIPPED: not finite" if stats["skipped"] else ""))
    parts.append(f"{stats['pairs_per_second']:.3g} pairs/s")
    parts.append(f"eta {_duration((updates - number) * stats['seconds'])}")
    parts.append(f"{stats['memory_gib']:.1f} GB")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} m" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def peak_memory_gib() -> float:
    """Peak device memory in GiB, or the peak resident memory of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / _GIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
