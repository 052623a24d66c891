"""Algorithm 1 of SePPO: draw a past policy, let it generate the negatives, learn, keep the new policy."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seppo_fast.config import Config
    from seppo_fast.trainer import Trainer


def train(config: Config, observe: Callable[[Trainer, int], None] = lambda trainer, updates: None) -> Path:
    """Algorithm 1: runs a whole training; weights, log and pictures go into `config.output`.

    Args:
        config: of the run.
        observe: called with the trainer and the number of finished updates: 0 before the first, then after each.

    Returns:
        The folder with the weights: a diffusers pipeline for full weights, a LoRA otherwise.

    Raises:
        ConfigError, DataError, NonFiniteError, CheckpointError: see `seppo_fast.errors`.
    """
    from seppo_fast.trainer import Trainer  # here, so that the command line can quiet the libraries before they load

    trainer = Trainer(config)
    observe(trainer, 0)
    for update in range(config.train.updates):
        if update % config.train.updates_per_iteration == 0:
            trainer.add_checkpoint()  # the first is checkpoint 0, the initial policy
        pairs = trainer.rollout.pairs(update)
        started = time.perf_counter()
        stats = trainer.learner.step(pairs, update)
        stats["rollout_seconds"], stats["learn_seconds"] = trainer.rollout.seconds, time.perf_counter() - started
        trainer.report(update + 1, stats)
        observe(trainer, update + 1)
    return trainer.save()


if __name__ == "__main__":
    from seppo_fast.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
