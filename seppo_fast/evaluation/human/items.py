"""Reads `items.json`, the list of generated media that `seppo-fast score` writes, and picks pairs of two models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import read_json

ITEMS = "items.json"
SUFFIXES = (".png", ".webp")  # a picture, a clip
_SCHEMA = 1
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Item:
    """One prompt, sample and seed, with the medium that each model generated from it.

    Attributes:
        id: the item's name, unique in its folder.
        prompt: the prompt.
        files: the media files by model.
    """

    id: str
    prompt: str
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Material:
    """The content of `items.json`.

    Attributes:
        models: digests of the models' weights and settings, by model.
        items: the items, in the file's order.
        digest: hexadecimal SHA-256 of the file.
    """

    models: Mapping[str, str]
    items: tuple[Item, ...]
    digest: str

    def pair(self, models: Sequence[str] | None) -> tuple[str, str]:
        """Returns the two models to compare; None: those of the file, if it lists exactly two.

        Raises:
            ConfigError: not exactly two different models are given, or one is not in the file.
        """
        known = ", ".join(self.models)
        if models is None and len(self.models) != 2:
            raise ConfigError(f"--models: choose two of {known}, such as --models {','.join(list(self.models)[:2])}")
        chosen = list(self.models if models is None else models)
        if len(chosen) != 2 or chosen[0] == chosen[1]:
            raise ConfigError(f"--models: expected two different models, got {','.join(chosen) or 'none'}; has {known}")
        for name in chosen:
            if name not in self.models:
                raise ConfigError(f"--models: {name!r} is not in {ITEMS}; it has {known}")
        return chosen[0], chosen[1]

    def with_media_of(self, models: tuple[str, str]) -> list[Item]:
        """Returns the items for which both models have a medium, all pictures or all clips.

        Raises:
            DataError: no item has both, or pictures and clips are mixed.
        """
        both = [item for item in self.items if all(model in item.files for model in models)]
        if not both:
            raise DataError(f"{ITEMS}: no item has media of both {models[0]} and {models[1]}; rerun seppo-fast score")
        kinds = {item.files[model].suffix for item in both for model in models}
        if len(kinds) > 1:
            raise DataError(f"{ITEMS}: pictures and clips are mixed for {models[0]} and {models[1]}")
        return both


def read_items(folder: Path) -> Material:
    """Reads `items.json` in the output folder of `seppo-fast score`.

    Raises:
        ConfigError: the folder has no `items.json`.
        DataError: the file is malformed, has another schema, or names a file that is missing or outside the folder.
    """
    file = folder / ITEMS
    try:
        tree = read_json(file, _MOST_BYTES)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise ConfigError(f"{folder}: not an output folder of seppo-fast score: {ITEMS} is missing") from None
    except (OSError, ValueError) as problem:
        raise DataError(f"{file}: cannot be read ({problem})") from problem
    try:
        return _material(tree, folder, digest)
    except ValueError as problem:
        raise DataError(f"{file}: {problem}; rerun seppo-fast score") from problem


def _material(tree: Any, folder: Path, digest: str) -> Material:
    if not isinstance(tree, dict) or tree.get("schema") != _SCHEMA:
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"expected schema {_SCHEMA}, got {found!r}")
    models = _field(tree, "models", dict, "the file")
    if not models or not all(name and isinstance(value, str) for name, value in models.items()):
        raise ValueError("models: expected a digest for each model's name")
    rows = _field(tree, "items", list, "the file")
    items = tuple(_item(row, f"items[{place}]", models, folder) for place, row in enumerate(rows))
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"the id {item.id!r} occurs twice")
        seen.add(item.id)
    return Material(models, items, digest)


def _item(row: Any, place: str, models: Mapping[str, str], folder: Path) -> Item:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, got {type(row).__name__}")
    name, prompt = _field(row, "id", str, place), _field(row, "prompt", str, place)
    if not name:
        raise ValueError(f"{place}.id is empty")
    for key in ("prompt_index", "sample", "seed"):
        if _field(row, key, int, place) < 0:
            raise ValueError(f"{place}.{key} is negative")
    files = _field(row, "files", dict, place)
    return Item(name, prompt, {model: _media_file(files[model], model, place, models, folder) for model in files})


def _media_file(name: Any, model: str, place: str, models: Mapping[str, str], folder: Path) -> Path:
    """Returns the file, after checking that it is a medium inside the folder."""
    where = f"{place}.files[{model!r}]"
    if model not in models:
        raise ValueError(f"{where}: the model is not in models")
    if not isinstance(name, str) or Path(name).suffix not in SUFFIXES:
        raise ValueError(f"{where}: expected a file ending in {' or '.join(SUFFIXES)}, got {name!r}")
    file = folder / name
    try:
        inside = file.resolve().is_relative_to(folder.resolve())
        exists = file.is_file()
    except (OSError, ValueError) as problem:
        raise ValueError(f"{where}: {name!r} is no file name ({problem})") from problem
    if not inside:
        raise ValueError(f"{where}: {name!r} resolves to a path outside the folder")
    if not exists:
        raise ValueError(f"{where}: {name!r} is missing")
    return file


def _field(row: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: {key} must be of type {kind.__name__}, got {value!r:.80}")
    return value
