"""Does a long run grow? `python -m benchmarks.flat --json FILE`: memory, threads and files over 2000 updates.

The embedded pipeline trains a LoRA, a state is saved every few seconds, past policies are bounded. Every so often the
process is looked at. A leak shows as a slope; what a run takes once, it has taken by a quarter of its updates.
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

LOOKS = 40  # over a run


@dataclass(frozen=True)
class Look:
    """What a process has at a moment.

    Attributes:
        update: finished.
        memory: bytes that are its own.
        threads: of Python.
        handles: open files.
        files: in the run's folder, and in that of the cache.
    """

    update: int
    memory: int
    threads: int
    handles: int
    files: int


class Watch:
    """Looks at this process now and then; give it to `seppo_fast.train.train` as `observe`.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._folders = [Path(config.output), Path(config.data.cache)]
        self._every = max(1, config.train.updates // LOOKS)
        self._process = psutil.Process()
        self.looks: list[Look] = []

    def __call__(self, trainer: Trainer, updates: int) -> None:
        if updates % self._every or not updates:
            return
        trainer.saver.wait()  # a state that is just being written is a thread, and files
        gc.collect()
        release_freed_memory()
        files = sum(path.is_file() for folder in self._folders for path in folder.rglob("*"))
        own = self._process.memory_full_info().uss
        self.looks.append(Look(updates, own, threading.active_count(), self._process.num_fds(), files))


def release_freed_memory() -> None:
    """Returns to the system what the C library keeps of freed memory: that is no leak, and differs from run to run."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)


def growth(looks: list[Look]) -> dict[str, float]:
    """How much more there is in the last quarter than in the second, by the medians of the looks."""
    quarter = len(looks) // 4
    before, after = looks[quarter : 2 * quarter], looks[-quarter:]

    def median(part: list[Look], name: str) -> float:
        return statistics.median(asdict(look)[name] for look in part)

    return {name: median(after, name) - median(before, name) for name in ("memory", "threads", "handles", "files")}


def long_run(folder: Path, updates: int, **sections: Any) -> list[Look]:
    """Trains so many updates in this process, and gives what was seen."""
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
    """Runs it, prints the growth and writes it where asked."""
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
