"""The optimizer of the trained weights, and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from seppo_fast.config.schema import Config, TrainConfig
from seppo_fast.models.trainable import trainable


def make_optimizer(module: nn.Module, learning_rate: float, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns AdamW over the trained weights with betas 0.9, 0.999, in 8 bits if `train.optimizer` says so."""
    settings: dict[str, Any] = {"lr": learning_rate, "weight_decay": config.weight_decay}
    parameters = list(trainable(module).values())
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes.optim import AdamW8bit  # an optional dependency; `preflight` has checked that it is installed

    return AdamW8bit(parameters, **settings)


def learning_rate(config: Config, update: int) -> float:
    """Returns the learning rate of an update (from 0): a linear warm-up, then constant or half a cosine.

    It depends neither on the number of processes nor on whether the run was resumed; a constant rate does not depend on
    `train.updates` either. The cosine would reach 0 one update after the last.
    """
    train = config.train
    warmup = train.warmup_updates
    if update < warmup:
        return config.learning_rate * ((update + 1) / warmup)
    if train.lr_schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (train.updates - warmup)))
