"""Checks that run before anything expensive starts, in training as in the `check` command."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

from seppo_fast.config.schema import Config
from seppo_fast.data.labels import with_labels
from seppo_fast.data.sources import Source, open_source
from seppo_fast.methods.replay.comparisons import shares
from seppo_fast.models.attention import require_xformers
from seppo_fast.models.registry import refuse_other_kind, validate_model
from seppo_fast.runs.folder import refuse_occupied
from seppo_fast.runs.trackers import require_trackers
from seppo_fast.scorers.functions import own_scorer
from seppo_fast.scorers.registry import missing_weights
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import blocking_file


def preflight(config: Config, device: torch.device, processes: int) -> Source:
    """Checks settings, folders and the shape of the data; loads no model and decodes no image.

    Returns:
        The opened data source.

    Raises:
        ConfigError: the output folder is occupied, or settings cannot work here or do not fit the data.
        CheckpointError: the output folder is not writable.
        DataError: there are no data; see `seppo_fast.data`.
    """
    validate_model(config)
    _check_names(config)
    refuse_occupied(Path(config.output))
    _check_cache(config.data.cache)
    samples = config.prompts_per_update
    if samples < processes:
        group, prompts = config.samples_per_prompt, config.row.reward is not None
        raise ConfigError(
            f"train.pairs_per_update = {config.train.pairs_per_update} and reference.uses = {config.reference.uses} "
            + (f"and rl.samples_per_prompt = {group} " if prompts else "")
            + f"leave fewer {'prompts' if prompts else 'samples'} per update ({samples}) than there are processes "
            f"({processes}): raise the first or lower the {'others' if prompts else 'second'}"
        )
    if config.row.replay and shares(config.train.pairs_per_update)[0] < processes:
        raise ConfigError(
            f"train.pairs_per_update = {config.train.pairs_per_update} gives objective {config.objective!r} fewer than "
            f"one comparison per process ({processes}) in the first iteration: raise it"
        )
    if config.train.pairs_per_update // config.block < processes:
        raise ConfigError(
            f"train.pairs_per_update = {config.train.pairs_per_update} and rpo.block = {config.block} leave fewer "
            f"blocks per update than there are processes ({processes}): raise the first or lower the second"
        )
    reference = config.reference
    rooms = [reference.host_gib, reference.disk_gib, *([reference.gpu_gib] if device.type == "cuda" else [])]
    if config.row.draw and not any(room is None or room > 0 for room in rooms):
        raise ConfigError(
            "reference.gpu_gib, host_gib, disk_gib: all are 0, which leaves no room for past policies"
            + ("" if device.type == "cuda" else " (gpu_gib counts only on a GPU)")
        )
    if config.train.optimizer == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("train.optimizer = adamw8bit needs bitsandbytes: pip install 'seppo_fast[8bit]'")
    require_trackers(config)
    _check_judge(config)
    if config.model.attention == "xformers":
        require_xformers(device)
    if config.train.backend == "triton":
        _check_triton("train.backend", "auto", device)
    if config.model.temporal_attention == "triton":
        _check_triton("model.temporal_attention", "sdpa", device)
    if not config.data.source:
        raise ConfigError("data.source is empty; give a folder, parquet files, a hub id, or shapes:N")
    source = open_source(config.data.source, config.data.split)
    if source.prompts_only and config.row.reward is None:
        raise ConfigError(
            f"data.source = {config.data.source!r} holds prompts without pictures, from which objective "
            f"{config.objective!r} cannot learn; objectives with a reward can: ddpo, grpo, nft, d3po, spo"
        )
    if config.row.needs_pairs:
        source = source.labelled()
    refuse_other_kind(config, source.clips)
    if config.row.needs_pairs and not source.has_losers:
        raise ConfigError(
            f"objective {config.objective!r} needs two images per prompt (the Pick-a-Pic schema), "
            f"but data.source = {config.data.source!r} has one; 'seppo' needs winners only"
        )
    if not len(source) and not source.problems:
        raise DataError(f"data.source = {config.data.source!r} contains no examples")
    return with_labels(source) if config.row.needs_labels else source


def _check_names(config: Config) -> None:
    """Raises a ConfigError for paths that are not UTF-8: the libraries that write there accept only UTF-8."""
    model, data = config.model, config.data
    places = {"output": config.output, "model.path": model.path, "data.cache": data.cache}
    for key, place in (places | {"model.motion_adapter": model.motion_adapter}).items():
        try:
            place.encode()
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            instead = (
                "rename it"
                if encoding == "utf-8"
                else f"this locale's encoding is {encoding}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
            )
            raise ConfigError(f"{key} = {place!r} is not UTF-8, which file names must be; {instead}") from None


def _check_judge(config: Config) -> None:
    """Raises a ConfigError if the run's scorer is unknown, lacks files, or cannot be imported."""
    if config.scorer is None:
        return
    key, name, folder = config.scorer
    lacking = missing_weights(name, None if folder is None else Path(folder))
    if lacking is not None:
        raise ConfigError(f"{key}: {lacking}")
    if ":" in name:
        own_scorer(name)


def _check_cache(place: str) -> None:
    """Raises a ConfigError if the folder for caches cannot be created because of a file."""
    try:
        blocking = blocking_file(Path(place))
    except OSError:
        return  # opening the cache reports it
    if blocking:
        where = "" if blocking == Path(place) else f": {blocking}"
        raise ConfigError(f"data.cache = {place!r}{where} is a file; choose another folder")


def _check_triton(key: str, without: str, device: torch.device) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{key} = triton needs triton: pip install 'triton>=3.6', or use {without!r}")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(f"{key} = triton needs a GPU, but this run is on {device.type}; use {without!r}")
