"""Which settings a run may be resumed with, and what becomes of those that were chosen by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from seppo_fast.config.load import parse_config, saved_values
from seppo_fast.config.schema import Config
from seppo_fast.runs.checkpoint import SavedState
from seppo_fast.utils.errors import CheckpointError, ConfigError

# Where things are, how fast they go, how long a run is, what it shows. All else decides what a run computes: model and
# data are compared by content, so that their folders may move.
_MAY_CHANGE = {
    "output", "memory",
    "model.path", "model.motion_adapter", "model.gradient_checkpointing", "model.attention",
    "model.temporal_attention", "model.compile", "model.deterministic",
    "data.source", "data.split", "data.cache",
    "train.updates", "train.micro_batch", "train.backend",
    "reference.window", "reference.park", "reference.gpu_gib", "reference.host_gib", "reference.disk_gib",
    "reference.pairs_gib",
    "sampler.batch",
    "log.sample_every", "log.sample_prompts", "log.trackers", "log.health_every",
    "save.minutes", "save.keep",
    "evaluation.guidance",
}  # fmt: skip
# What `memory` decides where it is left open.
_SET_BY_PRESET = {
    "model.gradient_checkpointing", "model.compile", "train.micro_batch", "reference.park", "sampler.batch",
}  # fmt: skip


def resumed_config(asked: Config, saved: SavedState) -> Config:
    """The configuration with which a run goes on: what is asked for now, and else what the run had chosen.

    Raises:
        ConfigError: settings that a run cannot change, each with its old and its new value; fewer updates in all than
            are finished.
        CheckpointError: a saved configuration that cannot be read.
    """
    before, chosen, now = _flat(saved_config(saved, "asked")), _flat(saved_config(saved)), _flat(asked)
    changed = {key for key, value in now.items() if before.get(key) != value}
    refused = [f"{key} = {before.get(key)!r}, not {now[key]!r}" for key in sorted(changed - _MAY_CHANGE)]
    if refused:
        raise ConfigError(
            f"output = {asked.output!r} holds a run with other settings: {'; '.join(refused)}. Go on with those it "
            "has, or choose another output"
        )
    if asked.train.updates < saved.update:
        raise ConfigError(
            f"train.updates = {asked.train.updates}, and the run in {asked.output!r} has finished {saved.update}"
        )
    if asked.train.lr_schedule == "cosine" and "train.updates" in changed:
        raise ConfigError(
            f"train.updates = {asked.train.updates}: the run in {asked.output!r} has a cosine schedule over "
            f"{before.get('train.updates')} updates, whose rates another number would change. Resume it with these, or "
            "begin another run from its weights"
        )
    if "memory" in changed:
        changed |= _SET_BY_PRESET
    if chosen.get("train.learning_rate") is None:  # by a version that kept its default rate unsaid
        chosen["train.learning_rate"] = 5e-6 if now["model.train"] == "full" else 1e-4
    tree: dict[str, Any] = {}
    for key in now:
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = now[key] if key in changed else chosen[key]
    return parse_config(tree, str(saved.folder))


def refuse_other_content(
    saved: SavedState, fingerprints: dict[str, tuple[str, ...]], instead: str = "Choose another output to begin anew"
) -> None:
    """Compares what a run was begun with by content.

    Args:
        saved: the state to go on from.
        fingerprints: of the model and of the data as they are now; any one of each has to be the saved one.
        instead: what the user can do, for the message.

    Raises:
        ConfigError: another model, other data.
        CheckpointError: fingerprints that cannot be read.
    """
    before = saved.numbers.get("fingerprints", {})
    if not isinstance(before, dict):
        raise CheckpointError(f"{saved.folder}: what it was begun with cannot be read ({before!r})")
    other = [name for name, values in fingerprints.items() if before.get(name) not in values]
    if other:
        raise ConfigError(
            f"the {' and the '.join(other)} changed since the run was begun, which can only go on with what it had. "
            + instead
            + (" (half-precision data are of a GPU: a CPU encodes them otherwise)" if "data" in other else "")
        )


def saved_config(saved: SavedState, name: str = "config") -> Config:
    """The configuration in a state: the one that ran, or the one that was `asked` for.

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
