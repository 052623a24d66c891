"""One SePPO update at true size: the SD-1.5 architecture with random weights, at 512 x 512, through the ordinary path.

    python -m benchmarks.full_size            # 859.5 M parameters, LoRA; minutes on a CPU with 24 GB, seconds on a GPU
    python -m benchmarks.full_size --clips    # AnimateDiff: 1312.7 M parameters, LoRA, 16 x 256 x 256
    python -m benchmarks.full_size --quick    # either on a toy architecture, to see that it runs

Weights are written as a diffusers folder (4.3 GB in a temporary folder, motion modules 1.8 GB) and loaded from it,
pictures are encoded by the full VAE, and the update is `seppo_fast.train` itself. Random weights are right for speed
and memory alone.

A clip costs 4.11 TFLOP a forward and 8.30 forward and backward: a guided step of one 8.2, the reference's errors of a
pair 8.2, its learning 24.8 with recomputed activations. In four steps that is 66 TFLOP, five minutes at the quarter of
a TFLOP/s of two cores in bfloat16. Recomputing, a pair's activations take 1.8 GB, else 16.5, so clips recompute unless
told not to; then loading is the peak, with the weights of the UNet twice in float32.
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
    """Writes a pipeline, and for clips motion modules that fit it; returns the number of parameters of the UNet."""
    parameters = write_pipeline(folder / "pipeline", quick)
    return parameters + (write_adapter(folder / "adapter", folder / "pipeline") if clips else 0)


def update_config(folder: Path, arguments: argparse.Namespace) -> Config:
    """One update of `sd15-lora.yaml`, or `animatediff.yaml`, in few pairs and few sampling steps."""
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
    """The command line, with what it leaves out filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a toy architecture at 64 x 64")
    parser.add_argument("--clips", action="store_true", help="AnimateDiff on clips")
    parser.add_argument("--pairs", type=int, help="pairs in the update; 2, or 1 of clips")
    parser.add_argument("--frames", type=int, help="of a clip; 16")
    parser.add_argument("--resolution", type=int, help="pixels; 512, or 256 of clips, or 64 with --quick")
    parser.add_argument("--micro-batch", type=int, default=1, help="pairs in one forward")
    parser.add_argument("--steps", type=int, default=4, help="guided DDIM steps of each reference sample")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="of clips: it is on")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args(words)
    if arguments.frames is not None and not arguments.clips:
        parser.error("--frames is of clips: give --clips, or leave it out")
    left_out = (CLIPS if arguments.clips else PICTURES) | ({"resolution": 64} if arguments.quick else {})
    for name, value in left_out.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


def main(words: list[str] | None = None) -> None:
    """Prints seconds by phase and peak memory."""
    arguments = parsed(words)
    ready: list[float] = []

    def observe(trainer: Trainer, updates: int) -> None:
        ready.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        # In a process of its own: the peak memory of making the weights is not that of training.
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
