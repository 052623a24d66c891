"""Small runs of the trainer for tests."""

from pathlib import Path
from typing import Any

import torch

from seppo_fast.config.load import parse_config
from seppo_fast.config.schema import Config
from seppo_fast.models.trainable import trainable
from seppo_fast.runs.journal import read_journal
from seppo_fast.train.trainer import Trainer


def tiny_config(pipeline: Path, folder: Path, **sections: Any) -> Config:
    """Returns a run of a few seconds on `tiny_pipeline`; `sections` (dictionaries or top-level values) override it."""
    tree: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": str(pipeline), "train": "full", "precision": "fp32"},
        "data": {"source": "shapes:11:3", "resolution": 16, "prompt_dropout": 0.2, "cache": str(folder / "cache")},
        "train": {
            "updates": 3, "updates_per_iteration": 2, "pairs_per_update": 6, "micro_batch": 4, "learning_rate": 1e-3,
            "warmup_updates": 0,
        },
        "sampler": {"steps": 2, "guidance": 3.0, "batch": 4},
        "log": {"sample_every": 0},
    }  # fmt: skip
    for name, value in sections.items():
        if isinstance(value, dict):
            tree[name] = tree.get(name, {}) | value
        else:
            tree[name] = value
    return parse_config(tree)


def log_of(config: Config) -> list[dict[str, float]]:
    """Returns the log of a run."""
    return read_journal(Path(config.output))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns copies of the trained weights."""
    return {name: weight.detach().clone() for name, weight in trainable(trainer.policy).items()}


def collected(trainer, update):
    """Returns the data that an update learns from, collected as in the training loop."""
    return trainer.method.collect(update, trainer.draws.reference(update))
