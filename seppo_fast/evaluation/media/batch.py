"""The batch in which the media of a folder are generated: one for all models and processes, as `settings.json` states.

A model's digest covers the batch, since rounding depends on it. So a batch that does not fit is halved for all models,
as long as no media exist that a smaller batch would make useless.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.media.work import alone
from seppo_fast.utils.errors import CheckpointError, OutOfMemoryError
from seppo_fast.utils.files import read_json, write_atomically
from seppo_fast.utils.logging import warn

SETTINGS = "settings.json"


class SmallerBatch(Exception):
    """The media have to be generated in the smaller batches that `settings.json` now states, from the first on."""


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes `settings.json`."""
    content = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / SETTINGS, content.encode("utf-8", "backslashreplace"), CheckpointError)


def recorded_batch(folder: Path) -> int | None:
    """Returns the batch that `settings.json` states; None if there is no such file, or it is malformed."""
    try:
        batch = read_json(folder / SETTINGS)["protocol"]["sampler"]["batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return batch if isinstance(batch, int) and batch > 0 else None


def follow_batch(folder: Path, batch: int) -> None:
    """Raises SmallerBatch if another process has recorded another batch than this one's."""
    if recorded_batch(folder) not in (None, batch):
        raise SmallerBatch


def halve_batch(folder: Path, settings: Mapping[str, Any], digests: Iterable[str]) -> None:
    """Records half of a batch that did not fit into memory, unless another process has recorded a smaller one.

    Args:
        folder: the folder of the media.
        settings: the content of `settings.json`, with the batch that did not fit.
        digests: the digests of the models that may have media in that batch.

    Raises:
        OutOfMemoryError: it was a batch of one, or media in that batch exist.
        CheckpointError: the folder cannot be written.
    """
    protocol, sampler = settings["protocol"], settings["protocol"]["sampler"]
    batch = sampler["batch"]
    with alone(folder, {SETTINGS}):
        if recorded_batch(folder) not in (None, batch):
            return
        half = min(batch, settings["prompts"]["count"]) // 2
        if not half:
            raise OutOfMemoryError("out of memory while generating one sample at a time; use a GPU with more memory")
        if any(True for digest in digests for _ in folder.glob(f"media/{digest}/[!.]*")):
            raise OutOfMemoryError(
                f"out of memory while generating; {folder} has media in batches of {batch}, and all models of a table "
                f"share one batch. Free memory and rerun, or choose another --output with --batch {half}"
            )
        warn(f"out of memory while generating; starting over with batches of {half} instead of {batch}")
        write_settings(folder, {**settings, "protocol": {**protocol, "sampler": {**sampler, "batch": half}}})
