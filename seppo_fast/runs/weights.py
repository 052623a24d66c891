"""A run's trained weights: the `weights/` folder that diffusers loads, and the model with a saved state's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from seppo_fast.config.schema import Config
from seppo_fast.models.family import Family
from seppo_fast.models.registry import load_family
from seppo_fast.models.trainable import lora_weights, make_trainable, trainable
from seppo_fast.runs.checkpoint import SavedState
from seppo_fast.runs.resume import refuse_other_content
from seppo_fast.runs.saver import AVERAGE, fitting, load_policy
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import free_name, read_json, staged_folder

_STAMP = "seppo_fast.json"


def write_weights(folder: Path, family: Family, policy: nn.Module, config: Config, finished: int) -> None:
    """Writes the trained weights; an existing folder (of the run when it was shorter) is renamed `weights-before`.

    Args:
        folder: the run's `weights/` folder.
        family: the model family, whose network holds the trained weights if `model.train` is "full".
        policy: the trained network, from which LoRA weights are taken.
        config: the run's configuration.
        finished: number of finished updates, stored with the weights.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    if folder.exists():
        folder.rename(free_name(folder.with_name("weights-before")))
    with staged_folder(folder, CheckpointError) as staging:
        if config.model.train == "full":
            family.save(staging)
        else:
            family.save_lora(staging, lora_weights(policy))
        fault("weights-write")
        (staging / _STAMP).write_text(json.dumps({"update": finished}) + "\n", encoding="utf-8")
    fault("weights")


def written_after(folder: Path) -> int | None:
    """Returns after which update a folder of weights was written, or None if it is missing or not recorded."""
    try:
        return int(read_json(folder / _STAMP)["update"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def load_trained(
    config: Config,
    saved: SavedState,
    device: torch.device,
    *,
    raw: bool,
    instead: str,
    loaded: Callable[[int], object] = lambda stages: None,
) -> tuple[Family, bool]:
    """Loads a run's base model and gives it the weights of a saved state, in float32.

    Args:
        config: the run's configuration; the base may have been moved since.
        saved: the state.
        device: the device of the model family.
        raw: whether to use the raw weights even if the run keeps their moving average.
        instead: what the user can do if the base is missing or has changed; the end of the error message.
        loaded: called with 1 after each of three stages: base loaded, compared with the run's, weights loaded.

    Returns:
        The model, and whether its weights are the moving average.

    Raises:
        ConfigError: the base is missing or has changed.
        CheckpointError: the state does not match the model.
    """
    try:
        family = load_family(config, device)
    except ConfigError as problem:
        raise ConfigError(f"{problem}. {instead}") from problem
    loaded(1)
    refuse_other_content(saved, {"model": (family.identity(),)}, instead)
    loaded(1)
    # Float32 whatever the training precision: in half precision, merging a LoRA would lose small changes to rounding.
    plain = config.model.model_copy(update={"precision": "fp32"})
    make_trainable(family.model, plain, config.seed, family)
    load_policy(family.model, saved)
    average = bool(config.train.ema_decay) and not raw
    if average:
        parameters = trainable(family.model)
        with torch.no_grad():
            for name, tensor in fitting(saved, AVERAGE, parameters).items():
                parameters[name].copy_(tensor)
    loaded(1)
    return family, average
