"""Which generated file belongs to which prompt and model, and how the files are named.

    FOLDER/items.json                                    which file of which model belongs to which prompt
    FOLDER/media/<model digest>/<prompt digest>-<prompt index>-<seed>-<sample>.png      or .webp for clips

The digest covers everything that determines a model's pictures, so a file whose name exists never has to be remade
unless it is damaged. Processes exchange nothing but these files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.media.prompts import PromptList
from seppo_fast.utils.errors import CheckpointError, ConfigError, DataError
from seppo_fast.utils.files import read_json, write_atomically

BASE = "base"
ITEMS = "items.json"
SUFFIXES = (".png", ".webp")  # a picture, a clip
SCHEMA = 1
READERS = 4  # threads that read and decode files


@dataclass(frozen=True)
class Item:
    """One sample of one prompt, with the file of each model.

    Attributes:
        id: the prompt's id in its file, which is made unique by appending numbers.
        prompt: the prompt.
        prompt_index: the prompt's place in its file, from 0.
        sample: the sample's number, from 0.
        seed: the seed of the starting noise.
        files: the paths of the media relative to the folder, by the model's name; "base" is first.
    """

    id: str
    prompt: str
    prompt_index: int
    sample: int
    seed: int
    files: Mapping[str, str]


@dataclass(frozen=True)
class Media:
    """What `items.json` lists.

    Attributes:
        models: the digest of each model, by name; "base" is first.
        items: all samples of all prompts, sample by sample.
        digest: the SHA-256 of the file; empty if it has not been read from one.
    """

    models: Mapping[str, str]
    items: Sequence[Item]
    digest: str = field(default="", compare=False)

    def write(self, folder: Path) -> None:
        """Writes `items.json`."""
        rows = [vars(item) | {"files": dict(item.files)} for item in self.items]
        tree = {"schema": SCHEMA, "models": dict(self.models), "items": rows}
        content = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / ITEMS, content.encode(), CheckpointError)


def media_of(prompts: PromptList, models: Mapping[str, str], samples: int, seed: int, *, clips: bool) -> Media:
    """Returns all items of a prompt list for models given by digest, whether or not their files exist."""
    items, taken = [], set[str]()
    for sample in range(samples):
        for place, prompt in enumerate(prompts.prompts):
            own = prompt.id if sample == 0 else f"{prompt.id}-{sample}"
            unique = next(one for one in itertools.chain([own], _numbered(own)) if one not in taken)
            taken.add(unique)
            name = file_name(prompt.text, place, seed, sample, clips=clips)
            files = {model: f"media/{digest}/{name}" for model, digest in models.items()}
            items.append(Item(unique, prompt.text, place, sample, seed, files))
    return Media(dict(models), items)


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}.{number}" for number in itertools.count(2))


def read_media(folder: Path) -> Media:
    """Reads `items.json` and checks it; whether the media files exist is not checked.

    Raises:
        ConfigError: the folder has no `items.json`.
        DataError: the file is malformed, has another schema, or names a file outside the folder.
    """
    file = folder / ITEMS
    try:
        tree = read_json(file, most=1 << 30)
        return _media(tree, hashlib.sha256(file.read_bytes()).hexdigest())
    except FileNotFoundError:
        raise ConfigError(
            f"{folder}: not an output folder of seppo-fast score, {ITEMS} is missing; generate first: run seppo-fast "
            "score without --only"
        ) from None
    except (OSError, ValueError) as problem:
        raise DataError(f"{file}: malformed ({problem}); remove it and rerun seppo-fast score") from problem


def _media(tree: Any, digest: str) -> Media:
    """Returns what a parsed `items.json` lists; raises ValueError."""
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA:
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"expected schema {SCHEMA}, got {found!r}")
    models = _field(tree, "models", dict, "the file")
    if not models or not all(name and isinstance(value, str) for name, value in models.items()):
        raise ValueError("models: expected a digest for each model's name")
    rows = _field(tree, "items", list, "the file")
    items = [_item(row, f"items[{place}]", models) for place, row in enumerate(rows)]
    if not items:
        raise ValueError("it lists no item")
    twice = next((name for name, times in Counter(item.id for item in items).items() if times > 1), None)
    if twice is not None:
        raise ValueError(f"the id {twice!r} occurs twice")
    return Media(models, items, digest)


def _item(row: Any, place: str, models: Mapping[str, str]) -> Item:
    """Returns an item of a parsed `items.json`; raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object, got {type(row).__name__}")
    name, prompt = (_field(row, key, str, place) for key in ("id", "prompt"))
    files = _field(row, "files", dict, place)
    if not name:
        raise ValueError(f"{place}.id is empty")
    index, sample, seed = (_field(row, key, int, place) for key in ("prompt_index", "sample", "seed"))
    if min(index, sample, seed) < 0:
        raise ValueError(f"{place}: prompt_index, sample and seed must be at least 0")
    if files.keys() != models.keys():
        raise ValueError(f"{place}.files: expected a file of each of {', '.join(models)}, got {', '.join(files)}")
    for model, path in files.items():
        where = f"{place}.files[{model!r}]"
        if not isinstance(path, str) or Path(path).suffix not in SUFFIXES:
            raise ValueError(f"{where}: expected a file ending in {' or '.join(SUFFIXES)}, got {path!r}")
        if os.path.isabs(path) or ".." in Path(path).parts or "\0" in path:
            raise ValueError(f"{where}: {path!r} is not a path inside the folder")
    return Item(name, prompt, index, sample, seed, files)


def _field(row: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    value = row.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: {key} must be of type {kind.__name__}, got {value!r:.80}")
    return value


def file_name(prompt: str, place: int, seed: int, sample: int, *, clips: bool) -> str:
    """Returns the name of a picture's or a clip's file."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:12]
    return f"{digest}-{place}-{seed}-{sample}.{'webp' if clips else 'png'}"


def model_digest(settings: Mapping[str, Any]) -> str:
    """Returns the name of a model's media folder.

    Args:
        settings: everything that determines a model's pictures for given prompts and seeds, serializable as JSON.
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def media_digests(folder: Path, media: Media) -> dict[str, str]:
    """Returns the SHA-256 of each media file, model by model.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    files = list(dict.fromkeys(item.files[name] for name in media.models for item in media.items))

    def digest(file: str) -> str:
        try:
            return hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except OSError as problem:
            raise ConfigError(
                f"{folder / file}: cannot be read ({problem.strerror}); generate it again: run the command without "
                "--only"
            ) from problem

    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(files, readers.map(digest, files), strict=True))
