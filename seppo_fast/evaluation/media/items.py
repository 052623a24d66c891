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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seppo_fast.evaluation.media.prompts import PromptList
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.files import read_json, write_atomically

BASE = "base"
ITEMS = "items.json"
SCHEMA = 1


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
    """

    models: Mapping[str, str]
    items: Sequence[Item]

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
    """Reads `items.json`.

    Raises:
        ConfigError: it does not exist, is malformed, or has a newer schema.
    """
    file = folder / ITEMS
    try:
        tree = read_json(file, most=1 << 30)
        if tree["schema"] != SCHEMA:
            raise ConfigError(f"{file}: has schema {tree['schema']!r}; this version reads {SCHEMA}")
        media = Media(dict(tree["models"]), [Item(**row) for row in tree["items"]])
        if not media.items or any(set(item.files) != set(media.models) for item in media.items):
            raise ValueError("an item lacks the file of a model, or there is no item")
        if any(not _is_inside(path) for item in media.items for path in item.files.values()):
            raise ValueError("a file is outside the folder")
    except FileNotFoundError:
        raise ConfigError(f"{file}: does not exist; generate first: run the command without --only") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(f"{file}: malformed ({problem}); remove it and generate again") from problem
    return media


def _is_inside(path: str) -> bool:
    return not os.path.isabs(path) and ".." not in Path(path).parts


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
