"""Runs one SePPO update at true size: SD-1.5's architecture, random weights, 512 x 512, through the ordinary path.

    python -m benchmarks.full_size            # 859.5 M parameters, LoRA; minutes on a CPU with 24 GB, seconds on a GPU
    python -m benchmarks.full_size --clips    # AnimateDiff: 1312.7 M parameters, LoRA, 16 x 256 x 256
    python -m benchmarks.full_size --quick    # either on a toy architecture, as a smoke test

Weights are written as a diffusers folder (4.3 GB in a temporary folder, motion modules 1.8 GB) and loaded from it,
pictures are encoded by the full VAE, and the update is `seppo_fast.train` itself. Random weights are valid for
measuring speed and memory only.

A clip costs 4.11 TFLOP per forward and 8.30 per forward and backward. So a guided step of one clip takes 8.2 TFLOP, the
reference's errors of a pair 8.2, and learning from a pair 24.8 with recomputed activations. With four steps this is 66
TFLOP, five minutes at the quarter of a TFLOP/s that two cores reach in bfloat16. A pair's activations take 1.8 GB with
recomputation and 16.5 GB without, so clips recompute by default. The peak is then loading, when the UNet's weights
exist twice in float32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from seppo_fast.utils.logging import quiet_libraries

quiet_libraries()

from benchmarks.harness.models import write_adapter, write_pipeline  # noqa: E402
from benchmarks.harness.provenance import provenance  # noqa: E402
from seppo_fast.config.load import parse_config  # noqa: E402
from seppo_fast.config.schema import Config  # noqa: E402
from seppo_fast.runs.journal import read_journal  # noqa: E402
from seppo_fast.train import train  # noqa: E402
from seppo_fast.train.trainer import Trainer  # noqa: E402

PICTURES = {"pairs": 2, "resolution": 512, "frames": None, "gradient_checkpointing": False}
CLIPS = {"pairs": 1, "resolution": 256, "frames": 16, "gradient_checkpointing": True}


def write_weights(folder: Path, quick: bool, clips: bool) -> int:
    """Writes a pipeline, and for clips matching motion modules; returns the UNet's number of parameters."""
    parameters = write_pipeline(folder / "pipeline", quick)
    return parameters + (write_adapter(folder / "adapter", folder / "pipeline") if clips else 0)


def update_config(folder: Path, arguments: argparse.Namespace) -> Config:
    """Returns the configuration of one LoRA update with few pairs and few sampling steps."""
    model = {"motion_adapter": str(folder / "adapter")} if arguments.clips else {}
    data = {"frames": arguments.frames} if arguments.clips else {}
    world = "shapes-motion" if arguments.clips else "shapes"
    return parse_config(
        {
            "output": str(folder / "run"),
            "model": {"path": str(folder / "pipeline"), "train": "lora", "precision": arguments.precision}
            | {"gradient_checkpointing": arguments.gradient_checkpointing}
            | model,
            "data": {
                "source": f"{world}:{arguments.pairs}",
                "resolution": arguments.resolution,
                "cache": str(folder / "cache"),
            }
            | data,
            "train": {"updates": 1, "pairs_per_update": arguments.pairs, "micro_batch": arguments.micro_batch},
            "sampler": {"steps": arguments.steps, "batch": arguments.pairs},
            "log": {"sample_every": 0, "health_every": 0},
        }
    )


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line and fills in defaults; a mistake in it ends the process with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy architecture at 64 x 64")
    parser.add_argument("--clips", action="store_true", help="AnimateDiff on clips")
    parser.add_argument("--pairs", type=int, help="pairs in the update; default: 2, with --clips 1")
    parser.add_argument("--frames", type=int, help="frames per clip; default: 16")
    parser.add_argument("--resolution", type=int, help="pixels; default: 512, with --clips 256, with --quick 64")
    parser.add_argument("--micro-batch", type=int, default=1, help="pairs in one forward")
    parser.add_argument("--steps", type=int, default=4, help="guided DDIM steps of each reference sample")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="default: on with --clips only"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(words)
    if arguments.frames is not None and not arguments.clips:
        parser.error("--frames applies to clips only: add --clips, or leave it out")
    left_out = (CLIPS if arguments.clips else PICTURES) | ({"resolution": 64} if arguments.quick else {})
    for name, value in left_out.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(words: list[str] | None = None) -> None:
    """Runs the update; prints each phase's seconds and the peak memory, and writes them to the requested file."""
    arguments = parsed(words)
    ready: list[float] = []

    def observe(trainer: Trainer, updates: int) -> None:
        ready.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        # In a separate process, so that writing the weights does not count in training's peak memory.
        with get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(write_weights, (folder, arguments.quick, arguments.clips))
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
        **({"frames": arguments.frames} if arguments.clips else {}),
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "precision": arguments.precision,
        "seconds": {
            "write random weights": written - started,
            "load, encode": ready[0] - written,
            "roll out": entry["rollout_seconds"],
            "learn": entry["learn_seconds"],
            "save": ended - ready[-1],
        },
        "peak_memory_gib": entry["memory_gib"],
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
