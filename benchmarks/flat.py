"""Checks a long run for leaks of memory, threads and files, over 2000 updates: `python -m benchmarks.flat --json FILE`.

The embedded pipeline trains a LoRA with a bounded number of past policies, and a state is saved every few seconds. The
process is sampled 40 times. A leak shows as a slope; one-time allocations are done within the first quarter of a run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config
    from seppo_fast.train.trainer import Trainer

LOOKS = 40  # number of samples over a run


@dataclass(frozen=True)
class Look:
    """A sample of the resources that the process uses.

    Attributes:
        update: number of finished updates.
        memory: memory unique to the process (USS), in bytes.
        threads: number of Python threads.
        handles: number of open file descriptors.
        files: number of files in the run's folder and the cache's.
    """

    update: int
    memory: int
    threads: int
    handles: int
    files: int


class Watch:
    """Samples this process during training; pass it to `seppo_fast.train.train` as `observe`.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: Config) -> None:
        self._folders = [Path(config.output), Path(config.data.cache)]
        self._every = max(1, config.train.updates // LOOKS)
        self._process = psutil.Process()
        self.looks: list[Look] = []

    def __call__(self, trainer: Trainer, updates: int) -> None:
        if updates % self._every or not updates:
            return
        trainer.saver.wait()  # a state that is being written would count as a thread and files
        gc.collect()
        release_freed_memory()
        files = sum(path.is_file() for folder in self._folders for path in folder.rglob("*"))
        own = self._process.memory_full_info().uss
        self.looks.append(Look(updates, own, threading.active_count(), self._process.num_fds(), files))


def release_freed_memory() -> None:
    """Makes the C library return freed memory to the system: what it keeps is no leak, but varies from run to run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def growth(looks: list[Look]) -> dict[str, float]:
    """Returns how much each resource grew from the second quarter to the last, by the medians of their samples."""
    quarter = len(looks) // 4
    before, after = looks[quarter : 2 * quarter], looks[-quarter:]

    def median(part: list[Look], name: str) -> float:
        return statistics.median(asdict(look)[name] for look in part)

    return {name: median(after, name) - median(before, name) for name in ("memory", "threads", "handles", "files")}


def long_run(folder: Path, updates: int, **sections: Any) -> list[Look]:
    """Trains in this process and returns the samples.

    Args:
        folder: folder for the run and the data cache.
        updates: number of updates.
        **sections: settings that replace the defaults, by section.
    """
    from seppo_fast.config.load import parse_config
    from seppo_fast.train import train

    tree: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": "shapes", "train": "lora", "lora_rank": 2, "precision": "fp32"},
        "data": {"source": "shapes:16:3", "resolution": 32, "cache": str(folder / "cache")},
        "train": {
            "updates": updates, "updates_per_iteration": 5, "pairs_per_update": 1, "micro_batch": 1, "ema_decay": 0.9,
        },
        "reference": {"keep": 3},
        "sampler": {"steps": 1, "guidance": 1.0, "batch": 5},
        "save": {"minutes": 0.05},
        "log": {"sample_every": 0},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] |= section
    config = parse_config(tree)
    watch = Watch(config)
    train(config, watch)
    return watch.looks


def main(words: list[str] | None = None) -> int:
    """Runs the training, prints the growth and writes it to the requested file; returns the exit code."""
    from benchmarks.harness.provenance import provenance

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args(words)
    if arguments.updates < LOOKS:
        parser.error(f"--updates must be at least {LOOKS}, got {arguments.updates}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        looks = long_run(Path(folder), arguments.updates)
    made = {
        **provenance("benchmarks.flat"),
        "updates": arguments.updates,
        "growth": growth(looks),
        "last": asdict(looks[-1]),
        "seconds": time.monotonic() - began,
    }
    print(json.dumps(made, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
