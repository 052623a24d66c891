"""`weights/` of a run: the trained model as a folder that diffusers loads, and after which update it was written."""

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
    """Writes what was trained, after so many updates; weights that a shorter run left are put aside.

    Raises:
        CheckpointError: the disk refused.
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
    """After which update a folder of weights was written; None where it does not say."""
    try:
        return int(read_json(folder / _STAMP)["update"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
