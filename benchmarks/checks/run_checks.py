"""The checks of `gpu_check` that use the trainer: equal weights, references in every tier, SD-1.5 at true size.

Each function is a step, as in `value_checks`. The runs are by `seppo_fast.train` and a few updates long.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.checks.value_checks import SUITE, Found
from benchmarks.harness.counters import peak_bytes
from benchmarks.harness.models import Workplace
from benchmarks.harness.rows import Row
from seppo_fast.config.schema import Config
from seppo_fast.runs.journal import read_journal
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer

_LN2 = math.log(2.0)


def small(place: Workplace) -> Workplace:
    """Returns a workplace with the embedded pipeline on the same machine."""
    return replace(place, model="shapes", resolution=32)


def run_config(place: Workplace, name: str, **sections: dict[str, Any]) -> Config:
    """Returns the configuration of a run with two updates of a few pairs, in the folder `name`."""
    tree: dict[str, dict[str, Any]] = {
        "model": {"compile": False, "gradient_checkpointing": False, "attention": "sdpa"},
        "data": {"source": place.source(8)},
        # A beta so small that nothing overflows at fp16's initial loss scale.
        "train": {"updates": 2, "updates_per_iteration": 2, "pairs_per_update": 4, "micro_batch": 2, "beta": 20.0}
        | {"learning_rate": 1e-4},
        "sampler": {"steps": 2, "guidance": 3.0, "batch": 4},
        "save": {"minutes": 0},
    }
    merged: dict[str, Any] = {key: tree.get(key, {}) | sections.get(key, {}) for key in {*tree, *sections}}
    made = place.config(**merged)
    return made.model_copy(update={"output": str(place.folder / name), "objective": "seppo-newest"})


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "full, fp32": ({"train": "full", "precision": "fp32"}, "ahead"),
    "lora, bf16": ({"train": "lora", "precision": "bf16"}, "ahead"),
    "full, bf16": ({"train": "full", "precision": "bf16"}, "ahead"),
    "full, fp16": ({"train": "full", "precision": "fp16"}, "ahead"),
    "lora, fp16": ({"train": "lora", "precision": "fp16"}, "ahead"),
    "full, bf16, apart": ({"train": "full", "precision": "bf16"}, "apart"),
    "lora, bf16, together": ({"train": "lora", "precision": "bf16"}, "together"),
    "full, bf16, recomputed": ({"train": "full", "precision": "bf16", "gradient_checkpointing": True}, "ahead"),
    "full, bf16, compiled": ({"train": "full", "precision": "bf16", "compile": True}, "ahead"),
}
_ON_A_CPU = ("full, fp32", "lora, bf16")


def equal_weights(place: Workplace, found: Found) -> None:
    """Checks that error differences are exactly zero in a run's first update, where policy and reference are equal."""
    gpu = place.machine.device.type == "cuda"
    for kind, (model, errors) in KINDS.items():
        if gpu or kind in _ON_A_CPU:
            config = run_config(small(place), f"equal-{kind}", model=model, reference={"errors": errors})
            train(config)
            _first_update_is_zero(f"equal weights, {kind}", config, found)


def _first_update_is_zero(name: str, config: Config, found: Found) -> None:
    first, *others = read_journal(Path(config.output))
    zero = first["logit_abs"] == 0 and first["aaf_rate"] == 1 and abs(first["loss"] - _LN2) < 1e-7
    detail = f"logit {first['logit_abs']}, loss {first['loss']}"
    found.value(f"{name}: zero", zero, "zero and ln 2", detail)
    moved = all(entry["logit_abs"] != 0 and math.isfinite(entry["loss"]) for entry in others if not entry["skipped"])
    found.value(f"{name}: moves", moved, "a finite loss", ", ".join(str(entry["loss"]) for entry in others))


def tiers(place: Workplace, found: Found) -> None:
    """Checks that a run gives the same bits with references on the GPU, in host memory and in files, and when repeated.

    On a GPU it uses `model.deterministic`, without which PyTorch's attention adds in any order.
    """
    gpu = place.machine.device.type == "cuda"
    places = {"host": {"gpu_gib": 0.0}, "files": {"gpu_gib": 0.0, "host_gib": 0.0}}
    if gpu:
        places = {"GPU": {}} | places
    digests: dict[str, str] = {}
    for name, reference in {**places, "again": next(iter(places.values()))}.items():
        config = run_config(
            small(place),
            f"tier-{name}",
            model={"train": "full", "precision": place.machine.precision, "deterministic": gpu},
            train={"updates": 4, "updates_per_iteration": 1},
            reference=reference,
        ).model_copy(update={"objective": "seppo"})
        seen: list[set[str]] = []

        def observe(trainer: Trainer, updates: int, seen: list[set[str]] = seen) -> None:
            assert trainer.references is not None
            seen.append(set(trainer.references.tiers.values()))

        train(config, observe)
        if name != "again":
            tier = {"GPU": "device", "host": "host", "files": "disk"}[name]
            found.value(f"references in the tier {name}", seen[-1] == {tier}, "its tier", str(seen[-1]))
        digests[name] = digest(Path(config.output) / "weights")
    first, *rest = digests
    for name in rest:
        what = "a run again" if name == "again" else f"a run with references in {name}"
        found.value(f"{what} gives the same weights", digests[name] == digests[first], f"references in {first}")


def digest(folder: Path) -> str:
    """Returns the sha256 of all weight files in a folder."""
    sha = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        sha.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return sha.hexdigest()


def true_size(place: Workplace, found: Found) -> None:
    """Trains SD-1.5's architecture at 512 px, as LoRA and with all weights: checks values, measures memory and seconds.

    On a CPU it uses the embedded pipeline. With all weights no state is saved, since that would write 18 GB.
    """
    runs: dict[Literal["lora", "full"], Callable[[Config], object]] = {"lora": train, "full": _updates}
    for kind, run in runs.items():
        config = run_config(
            place,
            f"true-size-{kind}",
            model={"train": kind, "precision": place.machine.precision},
            train={"pairs_per_update": 8, "micro_batch": 4, "learning_rate": 1e-5},
            sampler={"steps": 4, "guidance": 7.5, "batch": 8},
            save={"minutes": 60.0},
        )
        started = time.perf_counter()
        peak = peak_bytes(place.machine, partial(run, config), 0)
        if peak is None:  # on a CPU
            run(config)
        seconds = time.perf_counter() - started
        _first_update_is_zero(f"update at {place.resolution} px, {kind}", config, found)
        entry = read_journal(Path(config.output))[-1]
        rate = config.train.pairs_per_update / entry["learn_seconds"]
        name = f"run at {place.resolution} px, {kind}"
        found.rows.append(Row(SUITE, name, "ours", "ours", True, peak_allocated_bytes=peak))
        found.lines.append(
            f"{kind} at {place.resolution} px: {seconds:.0f} s from its start, {entry['learn_seconds']:.2f} s to "
            f"learn from 8 pairs ({rate:.1f} pairs/s), {entry['rollout_seconds']:.2f} s to roll out in 4 steps"
            + ("" if peak is None else f", {peak / 1e9:.1f} GB at most")
        )


def _updates(config: Config) -> None:
    """Runs the updates of a run, writing only its log."""
    trainer = Trainer(config)
    with trainer.running():
        for update in range(config.train.updates):
            if update % config.train.updates_per_iteration == 0:
                trainer.add_checkpoint()
            batch = trainer.method.collect(update, trainer.draws.reference(update))
            trainer.record(trainer.learner.step(batch, update))
