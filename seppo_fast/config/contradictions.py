"""Which settings do not go together, though each is right by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config, ModelConfig


def makes_clips(model: ModelConfig) -> bool:
    """Whether it is AnimateDiff: a motion adapter is given, or the folder is of a pipeline with one inside."""
    if model.motion_adapter:
        return True
    try:
        index = read_json(Path(model.path).expanduser() / "model_index.json")
        return bool(index["_class_name"] == "AnimateDiffPipeline")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # the model's loader says what is wrong
        return False


def refuse_contradictions(config: Config) -> None:
    """Refuses settings that are right by themselves and wrong together.

    Raises:
        ConfigError: what does not fit, and what to do.
    """
    if config.train.pairs_per_update % config.reference.uses:
        raise ConfigError(
            f"reference.uses = {config.reference.uses} must divide train.pairs_per_update = "
            f"{config.train.pairs_per_update}: the pairs of a sample stay in one update"
        )
    if config.reference.errors == "together" and config.model.train == "full":
        raise ConfigError(
            "reference.errors = together needs model.train = lora: policy and reference share one forward only "
            "where they share all weights but an adapter; for full weights use 'ahead', which is exact"
        )
    _refuse_what_only_clips_have(config)
    if config.reference.keep is None and config.reference.keep_rule != "reservoir":
        raise ConfigError(f"reference.keep_rule = {config.reference.keep_rule!r} needs reference.keep, how many stay")
    if config.reference.keep is not None and OBJECTIVES[config.objective].draw != "uniform":
        raise ConfigError(
            f"reference.keep: objective {config.objective!r} does not draw among its past policies; leave it out"
        )
    if config.reference.errors != "ahead" and OBJECTIVES[config.objective].draw is None:
        raise ConfigError(f"objective {config.objective!r} has no reference: leave out reference.errors")
    if config.model.deterministic and config.model.attention == "xformers":
        raise ConfigError(
            "model.deterministic = true goes with model.attention = sdpa: xformers' backward does not repeat"
        )
    if config.reference.errors != "ahead" and config.model.compile:
        raise ConfigError(f"model.compile goes with reference.errors = ahead, not with {config.reference.errors!r}")


def _refuse_what_only_clips_have(config: Config) -> None:
    model = config.model
    together = (model.path == "shapes-motion") == (model.motion_adapter == "shapes")
    if model.path in ("shapes", "shapes-motion") and not together:
        raise ConfigError(
            "the embedded parts go together: model.path = shapes for pictures; model.path = shapes-motion with "
            "model.motion_adapter = shapes for clips"
        )
    if model.temporal_attention == "triton" and config.data.frames > 32:
        raise ConfigError(f"model.temporal_attention = triton takes 32 frames, data.frames = {config.data.frames}")
    if config.model.train == "full" and config.model.lora_on != "both":
        raise ConfigError(f"model.lora_on = {config.model.lora_on!r} needs model.train = lora")
    if makes_clips(config.model):
        return
    for section, names in {"model": ("lora_on", "temporal_attention"), "data": ("frames", "flip")}.items():
        for name in names:
            keys_here = getattr(config, section)
            value = getattr(keys_here, name)
            if value != type(keys_here).model_fields[name].default:
                raise ConfigError(
                    f"{section}.{name} = {value!r} is for clips: give model.motion_adapter, or leave it out"
                )
