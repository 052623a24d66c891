"""Refuses combinations of settings that objectives with a reward cannot use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seppo_fast.config.rl import RlConfig
from seppo_fast.utils.errors import ConfigError

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config

MOST_STEP_BETA = 100.0  # ten times SPO's; the default of train.beta is another objective's
_PUBLISHED_STEP_BETA = {"d3po": 0.1, "spo": 10.0}
# The objectives of this package that use a setting; those that are not listed serve all of them.
_USED_BY = {
    "spread": ("grpo", "nft"),
    "prompt_buffer": ("ddpo",),
    "prompt_count": ("ddpo",),
    "eta": ("ddpo", "grpo", "d3po", "spo"),
    "steps": ("ddpo", "grpo"),
    "window": ("grpo",),
    "clip": ("ddpo", "grpo", "d3po", "spo"),
    "kl": ("grpo", "nft"),
    "mix": ("nft",),
    "candidates": ("spo",),
    "plain_steps": ("spo",),
    "gap": ("spo",),
}
_LEARNERS = ("ddpo", "grpo", "nft", "d3po", "spo")


def refuse_reward_contradictions(config: Config) -> None:
    """Checks the section `rl` against the objective and the other settings.

    Raises:
        ConfigError: two settings contradict each other; the message says what to change.
    """
    if config.row.reward is None:
        _refuse_unused(config)
        return
    rl, name = config.rl, config.objective
    if rl.reward is None:
        raise ConfigError(
            f"objective {name!r} needs rl.reward, the scorer whose score is the reward: pickscore, for example, or "
            "shapes for the embedded world"
        )
    _refuse_others(config)
    _refuse_groups(config)
    if rl.prompt_count > rl.prompt_buffer:
        raise ConfigError(
            f"rl.prompt_count = {rl.prompt_count} is never reached with rl.prompt_buffer = {rl.prompt_buffer}"
        )
    reference = config.reference
    if reference.errors != "ahead" or reference.redraw != "iteration" or reference.window is not None:
        raise ConfigError(
            f"objective {name!r} samples once per iteration and computes what it needs of the old policy then: remove "
            "reference.errors, reference.redraw and reference.window"
        )
    if config.train.updates % config.train.updates_per_iteration:
        raise ConfigError(
            f"train.updates = {config.train.updates} must be a multiple of train.updates_per_iteration = "
            f"{config.train.updates_per_iteration}: objective {name!r} compares the rewards of whole iterations"
        )
    if config.data.prompt_dropout:
        raise ConfigError(
            f"objective {name!r} trains on what was sampled for a prompt: set data.prompt_dropout = 0, got "
            f"{config.data.prompt_dropout:g}"
        )
    if config.row.process == "reverse":
        _refuse_reverse(config)


def _refuse_unused(config: Config) -> None:
    changed = _changed(config.rl)
    if changed:
        raise ConfigError(
            f"rl.{changed[0]}: objective {config.objective!r} learns from no reward; remove it, or set objective to "
            "ddpo, grpo, nft, d3po or spo"
        )


def _refuse_others(config: Config) -> None:
    name = config.objective
    for key in _changed(config.rl) if name in _LEARNERS else ():
        if name not in _USED_BY.get(key, _LEARNERS):
            raise ConfigError(f"rl.{key} is a setting of {' and '.join(_USED_BY[key])}, not of {name!r}: remove it")


def _changed(rl: RlConfig) -> list[str]:
    """Returns the keys whose values are not the defaults, in alphabetical order."""
    return sorted(key for key, value in rl if value != RlConfig.model_fields[key].default)


def _refuse_groups(config: Config) -> None:
    name, group, train = config.objective, config.samples_per_prompt, config.train
    if name in ("grpo", "nft") and group < 2:
        raise ConfigError(
            f"rl.samples_per_prompt = {group}: objective {name!r} compares samples of one prompt, so it needs at least "
            "2; ddpo compares with the prompt's earlier rewards instead"
        )
    fixed = {"d3po": 2, "spo": 1}.get(name)
    if fixed is not None and group != fixed:
        raise ConfigError(f"rl.samples_per_prompt = {group}: objective {name!r} needs {fixed}; remove the key")
    each = config.reference.uses * group
    if train.pairs_per_update % each:
        raise ConfigError(
            f"train.pairs_per_update = {train.pairs_per_update} must be a multiple of {each}: "
            f"rl.samples_per_prompt = {group} times reference.uses = {config.reference.uses}"
        )


def _refuse_reverse(config: Config) -> None:
    """Checks the settings of objectives that train on steps of the reverse process."""
    name, rl, steps = config.objective, config.rl, config.sampler.steps
    if config.sampler.name != "ddim":
        raise ConfigError(
            f"sampler.name = {config.sampler.name!r}: its steps are not random, so they have no log-probability; "
            f"objective {name!r} needs sampler.name = ddim"
        )
    if config.reference.uses != 1:
        raise ConfigError(
            f"reference.uses = {config.reference.uses}: objective {name!r} trains on each step of a sample once; set "
            "it to 1, or train a share of the steps with rl.steps"
        )
    if rl.window is not None and not 1 <= rl.window[0] <= rl.window[1] <= steps:
        raise ConfigError(
            f"rl.window = {list(rl.window)}: objective {name!r} trains the steps from the first to the last of these, "
            f"which must lie between 1 and sampler.steps = {steps}"
        )
    if name == "spo" and rl.plain_steps >= steps:
        raise ConfigError(f"rl.plain_steps = {rl.plain_steps} leaves none of sampler.steps = {steps} to compare at")
    if name in _PUBLISHED_STEP_BETA and config.train.beta > MOST_STEP_BETA:
        raise ConfigError(
            f"objective {name!r} with train.beta = {config.train.beta:g}: its beta multiplies log-ratios, published as "
            f"{_PUBLISHED_STEP_BETA[name]:g}; set train.beta, at most {MOST_STEP_BETA:g}"
        )
