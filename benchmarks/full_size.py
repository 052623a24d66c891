"""One SePPO update at true size: the SD-1.5 architecture with random weights, at 512 x 512, through the ordinary path.

    python -m benchmarks.full_size            # 859.5 M parameters, LoRA; minutes on a CPU with 24 GB, seconds on a GPU
    python -m benchmarks.full_size --quick    # the same on a toy architecture, to see that it runs

Weights are written as a diffusers folder (4.3 GB in a temporary folder) and loaded from it, pictures are encoded by
the full VAE, and the update is `seppo_fast.train` itself. Random weights are right for speed and memory alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from seppo_fast.quiet import quiet_libraries

quiet_libraries()

from benchmarks.models import write_pipeline  # noqa: E402
from benchmarks.provenance import provenance  # noqa: E402
from seppo_fast.config import Config, parse_config  # noqa: E402
from seppo_fast.journal import peak_memory_gib, read_journal  # noqa: E402
from seppo_fast.train import train  # noqa: E402
from seppo_fast.trainer import Trainer  # noqa: E402


def update_config(folder: Path, arguments: argparse.Namespace) -> Config:
    """One update of `sd15-lora.yaml` in few pairs and few sampling steps."""
    return parse_config(
        {
            "output": str(folder / "run"),
            "model": {"path": str(folder / "pipeline"), "train": "lora", "precision": arguments.precision}
            | {"gradient_checkpointing": arguments.gradient_checkpointing},
            "data": {
                "source": f"shapes:{arguments.pairs}",
                "resolution": 64 if arguments.quick else 512,
                "cache": str(folder / "cache"),
            },
            "train": {"updates": 1, "pairs_per_update": arguments.pairs, "micro_batch": arguments.micro_batch},
            "sampler": {"steps": arguments.steps, "batch": arguments.pairs},
            "log": {"sample_every": 0},
        }
    )


def main() -> None:
    """Prints seconds by phase and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy architecture at 64 x 64")
    parser.add_argument("--pairs", type=int, default=2, help="pairs in the update")
    parser.add_argument("--micro-batch", type=int, default=1, help="pairs in one forward")
    parser.add_argument("--steps", type=int, default=4, help="guided DDIM steps of each reference sample")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    ready: list[float] = []

    def observe(trainer: Trainer, updates: int) -> None:
        ready.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        # In a process of its own: the peak memory of making the weights is not that of training.
        with get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(write_pipeline, (folder / "pipeline", arguments.quick))
        written = time.perf_counter()
        config = update_config(folder, arguments)
        train(config, observe)
        ended = time.perf_counter()
        (entry,) = read_journal(folder / "run")
    result = provenance("benchmarks.full_size") | {
        "parameters": parameters,
        "pairs": arguments.pairs,
        "steps": arguments.steps,
        "resolution": config.data.resolution,
        "precision": arguments.precision,
        "seconds": {
            "write random weights": written - started,
            "load, encode": ready[0] - written,
            "roll out": entry["rollout_seconds"],
            "learn": entry["learn_seconds"],
            "save": ended - ready[-1],
        },
        "peak_memory_gib": peak_memory_gib(),
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
