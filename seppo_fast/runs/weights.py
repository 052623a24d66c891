"""A run's `weights/` folder: the trained model in a form that diffusers loads, and the update it was written after."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from seppo_fast.config.schema import Config
from seppo_fast.models.family import Family
from seppo_fast.models.trainable import lora_weights
from seppo_fast.utils.errors import CheckpointError
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
