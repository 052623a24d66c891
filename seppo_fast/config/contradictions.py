"""Which settings do not go together, though each is right by itself, whatever the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seppo_fast.utils.errors import ConfigError

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config


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
    if config.model.train == "full" and config.model.lora_on != "both":
        raise ConfigError(f"model.lora_on = {config.model.lora_on!r} needs model.train = lora")
    if config.reference.keep is None and config.reference.keep_rule != "reservoir":
        raise ConfigError(f"reference.keep_rule = {config.reference.keep_rule!r} needs reference.keep, how many stay")
    if config.reference.keep is not None and config.row.draw != "uniform":
        raise ConfigError(
            f"reference.keep: objective {config.objective!r} does not draw among its past policies; leave it out"
        )
    if config.reference.errors != "ahead" and config.row.draw is None:
        raise ConfigError(f"objective {config.objective!r} has no reference: leave out reference.errors")
    if config.model.deterministic and config.model.attention == "xformers":
        raise ConfigError(
            "model.deterministic = true goes with model.attention = sdpa: xformers' backward does not repeat"
        )
    if config.reference.errors != "ahead" and config.model.compile:
        raise ConfigError(f"model.compile goes with reference.errors = ahead, not with {config.reference.errors!r}")
    if config.sampler.round_trip and config.row.negatives != "generated":
        raise ConfigError(
            f"objective {config.objective!r} generates no samples to send through pixels: set sampler.round_trip = "
            "false"
        )
    _refuse_learning_settings(config)


def _refuse_learning_settings(config: Config) -> None:
    """Those of the loss and of the learning rate."""
    train = config.train
    if train.lr_schedule == "cosine" and train.updates <= train.warmup_updates:
        raise ConfigError(
            f"train.updates = {train.updates} must be more than train.warmup_updates = {train.warmup_updates} with "
            "lr_schedule = cosine, which begins after the warm-up"
        )
    if config.row.negatives is None and train.safeguard:
        raise ConfigError(f"objective {config.objective!r} has no losers to scale: set train.safeguard = false")
    if config.row.negatives is None and train.sft_weight:
        raise ConfigError(
            f"train.sft_weight adds plain fine-tuning to a preference; objective {config.objective!r} has none: set it "
            "to 0"
        )
    if not train.safeguard and train.safeguard_mu != type(train).model_fields["safeguard_mu"].default:
        raise ConfigError(f"train.safeguard_mu = {train.safeguard_mu} needs train.safeguard = true")
