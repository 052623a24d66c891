"""Records what short runs compute: logs, digests of weights and pictures, and states to resume from.

    python -m tests.golden.record        # writes record.json and states/ beside this file

The record is written by the commit whose values later commits must reproduce; `tests/runs/test_golden.py` compares.
Values are equal bit for bit if torch, the CPU and its instruction set are those of the record (`environment`);
elsewhere they are only close.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.faults import TIMES, logged
from seppo_fast.config.load import parse_config, to_yaml
from seppo_fast.config.schema import Config
from seppo_fast.runs.checkpoint import saved_states, state_folder
from seppo_fast.train import train
from tests.helpers.ranks import Ranks
from tests.helpers.tiny import tiny_adapter, tiny_pipeline

HERE = Path(__file__).parent
UPDATES, KEPT = 4, 2  # updates of a run; the state after this many is kept
TWO = "two processes"
STATES = ("full", "clips", "bounded", "average", "sft")  # runs whose state is kept; the others' states are similar

RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"model": {"train": "full"}, "train": {"updates_per_iteration": 4}},
    "clips": {"model": {"motion_adapter": "adapter"}, "data": {"source": "shapes-motion:5:3", "frames": 3}},
    "bounded": {"reference": {"keep": 2, "redraw": "update"}, "train": {"updates_per_iteration": 1}},
    "average": {"train": {"ema_decay": 0.9, "warmup_updates": 3}},
    "bf16": {"model": {"precision": "bf16"}},
    "sft": {"objective": "sft"},
    "dpo": {"objective": "diffusion-dpo", "data": {"source": "pairs.parquet"}},
    "spin": {"objective": "spin"},
    "together": {"reference": {"errors": "together"}},
    TWO: {"train": {"pairs_per_update": 5}},
}


def environment() -> dict[str, Any]:
    """Returns what decides the bits of a run on a CPU."""
    models = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
    }


def make_inputs(folder: Path) -> None:
    """Writes a pipeline, a motion adapter and labelled pairs, which runs in `folder` find by relative paths."""
    tiny_pipeline(folder / "pipeline", channels=(8, 16))
    tiny_adapter(folder / "adapter", block_out_channels=(8, 16))
    draw = np.random.default_rng(0)
    for file in sorted([*folder.glob("pipeline/*/*.safetensors"), *folder.glob("adapter/*.safetensors")]):
        _redraw(file, draw)

    def png() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    columns: dict[str, list[Any]] = {name: [png() for _ in range(5)] for name in ("jpg_0", "jpg_1")}
    columns |= {"label_0": [1.0, 0.0, 1.0, 0.0, 0.5], "label_1": [0.0, 1.0, 0.0, 1.0, 0.5]}
    columns["caption"] = [f"caption {row}" for row in range(5)]
    pq.write_table(pa.table(columns), folder / "pairs.parquet")


def config_of(name: str) -> Config:
    """Returns the configuration of a run, with relative paths only."""
    tree: dict[str, Any] = {
        "output": f"runs/{name}",
        "model": {"path": "pipeline", "train": "lora", "lora_rank": 2, "precision": "fp32"},
        "data": {"source": "shapes:6:3", "resolution": 16, "prompt_dropout": 0.2, "cache": "cache"},
        "train": {
            "updates": UPDATES, "updates_per_iteration": 2, "pairs_per_update": 4, "micro_batch": 3, "beta": 100.0,
            "learning_rate": 1e-3, "warmup_updates": 0,
        },
        "sampler": {"steps": 2, "guidance": 3.0, "batch": 4},
        "log": {"sample_every": 2, "sample_prompts": ["a small red circle", "b"]},
        "save": {"minutes": 0, "keep": 9},
    }  # fmt: skip
    for key, value in RUNS[name].items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(tree)


def run(name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Trains or resumes a run in `folder` and returns what it computed.

    Args:
        name: key of `RUNS`.
        folder: folder with the inputs; the working folder during the run.
        ranks: starts the run that has several processes.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        config = config_of(name)
        if name != TWO:
            train(config)
        else:
            places = {"--model.path": "pipeline", "--data.cache": "cache", "--output": config.output}
            (folder / "two.yaml").write_text(to_yaml(config))
            words = [word for flag, place in places.items() for word in (flag, folder / place)]
            ends = ranks.run(2, "train", folder / "two.yaml", *words)
            assert [end.code for end in ends] == [0, 0], ends[0].out
        return computed(folder / config.output)
    finally:
        os.chdir(before)


def computed(place: Path) -> dict[str, Any]:
    """Returns a finished run's log and, of its tensors and pictures, digests and numbers to compare elsewhere."""
    log = [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in logged(place)]
    newest = saved_states(place)[0]
    files = sorted(file for folder in (place / "weights", newest) for file in folder.rglob("*.safetensors"))
    pictures = sorted((place / "samples").glob("*.png"))
    return {
        "log": log,
        "tensors": {str(file.relative_to(place)): _tensors(file) for file in files},
        "pictures": {file.name: _pixels(file) for file in pictures},
    }


def keep(name: str, folder: Path) -> None:
    """Copies a run's state after `KEPT` updates into states/ beside this file."""
    shutil.copytree(state_folder(folder / config_of(name).output, KEPT), HERE / "states" / name)


def put_back(name: str, folder: Path) -> None:
    """Copies a kept state into `folder` as a run that can be resumed."""
    shutil.copytree(HERE / "states" / name, state_folder(folder / config_of(name).output, KEPT))


def _redraw(file: Path, draw: np.random.Generator) -> None:
    """Replaces the random tensors in a weight file by values from NumPy, which are the same on every processor."""
    tensors = load_file(file)
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and tensor.unique().numel() > 1:
            values = draw.standard_normal(tuple(tensor.shape)) * float(f"{tensor.std():.1g}")
            tensors[name] = torch.from_numpy(values).to(tensor.dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def _tensors(file: Path) -> dict[str, Any]:
    tensors = load_file(file)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    # Past policies, which are stored as bytes, are skipped.
    floats = [tensor.double() for tensor in tensors.values() if tensor.is_floating_point()]
    squares = sum(float(tensor.square().sum()) for tensor in floats)
    return {"sha256": digest.hexdigest(), "norm": squares**0.5}


def _pixels(file: Path) -> dict[str, Any]:
    pixels = np.asarray(Image.open(file).convert("RGB"))
    return {"sha256": hashlib.sha256(pixels.tobytes()).hexdigest(), "mean": float(pixels.mean())}


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).exists() else []


def main() -> None:
    """Writes a new record."""
    shutil.rmtree(HERE / "states", ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary, Ranks(Path(temporary)) as ranks:
        folder = Path(temporary)
        make_inputs(folder)
        runs = {}
        for name in RUNS:
            runs[name] = run(name, folder, ranks)
            if name in STATES:
                keep(name, folder)
    record = {"environment": environment(), "runs": runs}
    (HERE / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
