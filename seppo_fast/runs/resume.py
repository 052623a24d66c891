"""Decides which settings may change when a run is resumed, and keeps those that the run chose by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seppo_fast.config.load import parse_config, saved_values
from seppo_fast.config.schema import Config
from seppo_fast.runs.checkpoint import SavedState
from seppo_fast.utils.errors import CheckpointError, ConfigError

# Settings of paths, speed, memory, length and logging. All others decide what a run computes. Model and data are
# compared by content, so their folders may move.
_MAY_CHANGE = {
    "output", "memory",
    "model.path", "model.motion_adapter", "model.gradient_checkpointing", "model.attention",
    "model.temporal_attention", "model.compile", "model.deterministic",
    "data.source", "data.split", "data.cache",
    "train.updates", "train.micro_batch", "train.backend",
    "reference.window", "reference.park", "reference.gpu_gib", "reference.host_gib", "reference.disk_gib",
    "reference.pairs_gib", "reference.judge_weights", "rl.reward_weights",
    "sampler.batch",
    "log.sample_every", "log.sample_prompts", "log.trackers", "log.health_every",
    "save.minutes", "save.keep",
    "evaluation.guidance",
}  # fmt: skip
# Settings that the `memory` preset fills in when they are not set.
_SET_BY_PRESET = {
    "model.gradient_checkpointing", "model.compile", "train.micro_batch", "reference.park", "sampler.batch",
}  # fmt: skip


def resumed_config(asked: Config, saved: SavedState) -> Config:
    """Returns the configuration to resume with: settings changed since the run began, else the ones it resolved then.

    Args:
        asked: the configuration as the user gave it now.
        saved: the state to resume from.

    Raises:
        ConfigError: a changed setting that a run cannot change, with its old and new value; `train.updates` is below
            the number of finished updates, or differs under a cosine schedule.
        CheckpointError: the saved configuration cannot be read.
    """
    before, chosen, now = _flat(saved_config(saved, "asked")), _flat(saved_config(saved)), _flat(asked)
    changed = {key for key, value in now.items() if before.get(key) != value}
    refused = [f"{key} = {before.get(key)!r}, not {now[key]!r}" for key in sorted(changed - _MAY_CHANGE)]
    if refused:
        raise ConfigError(
            f"output = {asked.output!r} holds a run with other settings: {'; '.join(refused)}. Resume with the run's "
            "own settings, or choose another output"
        )
    if asked.train.updates < saved.update:
        raise ConfigError(
            f"train.updates = {asked.train.updates}, but the run in {asked.output!r} has finished {saved.update}"
        )
    if asked.train.lr_schedule == "cosine" and "train.updates" in changed:
        raise ConfigError(
            f"train.updates = {asked.train.updates}: the run in {asked.output!r} has a cosine schedule over "
            f"{before.get('train.updates')} updates, and another number would change its learning rates. Resume with "
            "this number, or start another run from its weights"
        )
    if "memory" in changed:
        changed |= _SET_BY_PRESET
    if chosen.get("train.learning_rate") is None:  # saved by a version that did not store the default
        chosen["train.learning_rate"] = 5e-6 if now["model.train"] == "full" else 1e-4
    tree: dict[str, Any] = {}
    for key in now:
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = now[key] if key in changed else chosen[key]
    return parse_config(tree, str(saved.folder))


def refuse_other_content(
    saved: SavedState, fingerprints: dict[str, tuple[str, ...]], instead: str = "Choose another output to begin anew"
) -> None:
    """Compares the model and the data with those that the run started with, by content.

    Args:
        saved: the state to resume from.
        fingerprints: the current fingerprints of model and data; for each, the saved one must be among those given.
        instead: what the user can do; the end of the error message.

    Raises:
        ConfigError: the model or the data differ.
        CheckpointError: the saved fingerprints cannot be read.
    """
    before = saved.numbers.get("fingerprints", {})
    if not isinstance(before, dict):
        raise CheckpointError(f"{saved.folder}: the fingerprints of model and data cannot be read ({before!r})")
    other = [name for name, values in fingerprints.items() if before.get(name) not in values]
    if other:
        raise ConfigError(
            f"the {' and the '.join(other)} changed since the run was started; it can only resume with the same. "
            + instead
            + (" (in half precision a GPU encodes data in float16, a CPU in float32)" if "data" in other else "")
        )


def saved_config(saved: SavedState, name: str = "config") -> Config:
    """Returns a configuration from a state.

    Args:
        saved: the state.
        name: "config" for the resolved configuration that ran, "asked" for the one that the user gave.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return saved_values(saved.numbers[name], f"{saved.folder}: {name}")
    except (KeyError, ConfigError) as problem:
        raise CheckpointError(f"{saved.folder}: its configuration cannot be read ({problem})") from problem


def _flat(config: Config) -> dict[str, Any]:
    def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))
