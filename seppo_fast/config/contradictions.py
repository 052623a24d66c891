"""Refuses combinations of settings that contradict each other, independently of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seppo_fast.config.objectives import SCORER
from seppo_fast.config.rl_contradictions import refuse_reward_contradictions
from seppo_fast.utils.errors import ConfigError

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config

MOST_MAPO_BETA = 10.0  # a hundred times the published value; the default of train.beta is another objective's


def refuse_contradictions(config: Config) -> None:
    """Checks settings against each other; each value by itself is valid already.

    Raises:
        ConfigError: two settings contradict each other; the message says what to change.
    """
    if config.train.pairs_per_update % config.reference.uses:
        raise ConfigError(
            f"reference.uses = {config.reference.uses} must divide train.pairs_per_update = "
            f"{config.train.pairs_per_update}: all pairs made from one sample belong to the same update"
        )
    if config.reference.errors == "together" and config.model.train == "full":
        raise ConfigError(
            "reference.errors = together needs model.train = lora: policy and reference can share one forward only "
            "if all their weights but an adapter are the same; to train all weights use 'ahead', which is exact"
        )
    if config.model.train == "full" and config.model.lora_on != "both":
        raise ConfigError(f"model.lora_on = {config.model.lora_on!r} needs model.train = lora")
    if config.reference.keep is None and config.reference.keep_rule != "reservoir":
        raise ConfigError(
            f"reference.keep_rule = {config.reference.keep_rule!r} needs reference.keep, the number of past policies "
            "to keep"
        )
    if config.reference.keep is not None and config.row.draw != "uniform":
        raise ConfigError(
            f"reference.keep: objective {config.objective!r} does not draw among past policies; remove reference.keep"
        )
    if config.reference.errors != "ahead" and config.row.draw is None:
        raise ConfigError(f"objective {config.objective!r} has no reference: remove reference.errors")
    if config.model.deterministic and config.model.attention == "xformers":
        raise ConfigError(
            "model.deterministic = true needs model.attention = sdpa: the backward of xformers is not deterministic"
        )
    if config.reference.errors != "ahead" and config.model.compile:
        raise ConfigError(f"model.compile needs reference.errors = ahead, got {config.reference.errors!r}")
    if config.sampler.round_trip and config.row.negatives != "generated":
        raise ConfigError(
            f"objective {config.objective!r} generates no samples to decode and encode: set sampler.round_trip = false"
        )
    _refuse_judge_settings(config)
    refuse_reward_contradictions(config)
    _refuse_block_settings(config)
    if config.row.replay:
        _refuse_replay_settings(config)
    _refuse_learning_settings(config)


def _refuse_judge_settings(config: Config) -> None:
    """Checks the settings of objectives whose sign is a scorer's verdict."""
    reference, judged = config.reference, config.row.flipper == SCORER
    if judged and reference.judge is None:
        raise ConfigError(
            f"objective {config.objective!r} needs reference.judge, the scorer that compares samples with winners: "
            "pickscore, for example, or shapes for the embedded world"
        )
    if not judged and (reference.judge is not None or reference.judge_weights is not None):
        raise ConfigError(
            f"reference.judge: objective {config.objective!r} uses no scorer; remove it, or set objective = "
            "seppo-judged"
        )
    if judged and config.train.safeguard:
        raise ConfigError(f"train.safeguard is not available for objective {config.objective!r}: set it to false")
    if judged and config.train.tie_tol:
        raise ConfigError(
            f"train.tie_tol is a setting of the anchor test, which objective {config.objective!r} does not use: set it "
            "to 0"
        )


def _refuse_block_settings(config: Config) -> None:
    """Checks the settings of blocks of pairs, which belong to Diffusion-RPO alone."""
    train, block = config.train, config.rpo.block
    if config.row.loss != "rpo":
        for key, field in type(config.rpo).model_fields.items():
            if getattr(config.rpo, key) != field.default:
                raise ConfigError(
                    f"rpo.{key}: objective {config.objective!r} does not compare blocks of pairs; remove it"
                )
        return
    if config.reference.uses > 1:
        raise ConfigError(
            f"objective {config.objective!r} needs reference.uses = 1: a block must not hold the same pair twice"
        )
    for key in ("pairs_per_update", "micro_batch"):
        pairs = getattr(train, key)
        if pairs is not None and pairs % block:
            raise ConfigError(
                f"train.{key} = {pairs} must be a multiple of rpo.block = {block}: a block is trained as a whole, by "
                "one process and in one micro-batch"
            )


def _refuse_replay_settings(config: Config) -> None:
    """Checks the settings of objectives that keep the samples of all iterations."""
    why = {
        "reference.uses": (config.reference.uses, 1, "an update compares each sample once"),
        "reference.window": (config.reference.window, None, "the samples of an iteration are generated at once"),
        "reference.redraw": (config.reference.redraw, "iteration", "the newest past policy samples once per iteration"),
        "train.sft_weight": (config.train.sft_weight, 0, "some winners are the model's own samples"),
    }
    for key, (value, needed, reason) in why.items():
        if value != needed:
            said = "null" if needed is None else needed
            raise ConfigError(f"objective {config.objective!r} needs {key} = {said}, got {value}: {reason}")


def _refuse_learning_settings(config: Config) -> None:
    """Checks the settings of the loss and of the learning rate."""
    train = config.train
    if train.lr_schedule == "cosine" and train.updates <= train.warmup_updates:
        raise ConfigError(
            f"train.updates = {train.updates} must be more than train.warmup_updates = {train.warmup_updates} if "
            "train.lr_schedule = cosine, because the cosine begins after the warm-up"
        )
    if config.row.loss != "preference":
        _refuse_preference_settings(config)
    if config.row.negatives is None and train.safeguard:
        raise ConfigError(f"objective {config.objective!r} has no losers to scale: set train.safeguard = false")
    if config.row.negatives is None and train.sft_weight:
        raise ConfigError(
            f"train.sft_weight adds plain fine-tuning to a preference loss; objective {config.objective!r} has none: "
            "set train.sft_weight = 0"
        )
    if not train.safeguard and train.safeguard_mu != type(train).model_fields["safeguard_mu"].default:
        raise ConfigError(f"train.safeguard_mu = {train.safeguard_mu} needs train.safeguard = true")


def _refuse_preference_settings(config: Config) -> None:
    """Checks that an objective with another loss has no setting of the preference loss; MaPO's beta is another one."""
    train = config.train
    if config.row.loss == "mapo" and train.beta > MOST_MAPO_BETA:
        raise ConfigError(
            f"objective {config.objective!r} with train.beta = {train.beta:g}: MaPO's beta is the weight of its margin "
            f"beside the winners' error, published as 0.1 and at most {MOST_MAPO_BETA:g} here; set train.beta = 0.1"
        )
    for key in ("safeguard", "sft_weight", "tie_tol"):
        if getattr(train, key):
            off = str(type(train).model_fields[key].default).lower()
            raise ConfigError(
                f"objective {config.objective!r} has a loss of its own, without train.{key}: set train.{key} = {off}"
            )
