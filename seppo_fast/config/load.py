"""Reads a configuration from a YAML file, a recipe that ships with the package, or the file that a run saved."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from seppo_fast.config.contradictions import refuse_contradictions
from seppo_fast.config.plain_yaml import read_yaml
from seppo_fast.config.schema import Config, closest, did_you_mean, keys
from seppo_fast.config.section import Section
from seppo_fast.utils.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"


def read_config(path: str | Path) -> Config:
    """Reads a YAML file, or the recipe of that name that ships with the package.

    Raises:
        ConfigError: the file does not exist, is not YAML, has an unknown key (a similar one is suggested) or an invalid
            value, or its settings contradict each other.
    """
    file = Path(path)
    if not file.exists() and str(path) == file.name:
        file = RECIPES / file.name
    if not file.exists():
        similar = closest(file.stem, [Path(name).stem for name in recipe_names()])
        advice = f", did you mean the recipe '{similar}.yaml'?" if similar else f"; {shipped()}"
        raise ConfigError(f"config {str(path)!r} does not exist{advice}")
    if file.is_dir():
        raise ConfigError(
            f"config {str(path)!r} is a folder, not a YAML file; to train on its pictures, name a recipe first and the "
            f"folder as the data: sd15-lora.yaml --data.source {shlex.quote(str(path))}"
        )
    try:
        tree = read_yaml(file)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return parse_config(tree or {}, str(path))


def shipped() -> str:
    """Returns the part of a message that lists the recipes."""
    return f"recipes that ship with seppo_fast: {', '.join(recipe_names())}"


def recipe_names() -> list[str]:
    """Returns the file names of the recipes that ship with the package."""
    return sorted(recipe.name for recipe in RECIPES.glob("*.yaml"))


def parse_config(tree: Any, origin: str = "config") -> Config:
    """Builds the configuration from nested dictionaries; aliases are accepted at the top level.

    Args:
        tree: the parsed YAML.
        origin: how error messages name the source.

    Raises:
        ConfigError: an unknown key, an invalid value, or settings that contradict each other.
    """
    config = saved_values(tree, origin)
    refuse_contradictions(config)
    return config


def saved_values(tree: Any, origin: str) -> Config:
    """Builds the configuration that a run saved: as `parse_config`, without checking settings against each other.

    Raises:
        ConfigError: unknown keys or invalid values.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a mapping at the top level, got {type(tree).__name__}")
    resolved: dict[str, Any] = {}
    sections = {name for name in Config.model_fields if isinstance(getattr(Config(), name), Section)}
    for key, value in tree.items():
        if key in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"{origin}: section {key!r} must be a mapping of keys, got {_shown(value)}")
            resolved.setdefault(key, {}).update(value)
            continue
        section, dot, name = keys().get(str(key), str(key)).rpartition(".")
        place = resolved.setdefault(section, {}) if dot and section in sections else resolved
        if name in place or name in (tree.get(section) or {}):
            raise ConfigError(f"{origin}: {key!r} is another name for {section}.{name}, which is also set; remove one")
        place[name] = value
    try:
        return Config.model_validate(resolved)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{did_you_mean(key, keys())}"
    if not key:
        return str(problem["msg"]).removeprefix("Value error, ")
    return f"{key} = {_shown(problem['input'])}: {problem['msg']}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def to_yaml(config: Config) -> str:
    """Returns a configuration as YAML, with every key spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
