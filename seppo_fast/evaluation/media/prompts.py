"""Reads prompt files: text with a prompt per line, or JSON lists of strings or objects."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import home_expanded, read_json

_TEXTS = ("prompt", "caption", "text")  # the keys of a record that may hold the prompt; the first that exists counts
_IDS = ("caption_id", "id")
_MOST_BYTES = 1 << 26
_FORMS = (
    "a .txt file holds one prompt per line, a .json file a list of strings or of objects with the prompt under "
    "prompt, caption or text"
)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file.

    Attributes:
        id: its id in the file: `caption_id` or `id` of its record, else its place, from 0.
        text: the prompt.
    """

    id: str
    text: str


@dataclass(frozen=True)
class PromptList:
    """The prompts of a file, in order; duplicates are kept.

    Attributes:
        name: the file's name, without its folder.
        prompts: the prompts.
    """

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        """The SHA-256 of ids and prompts in order; the same list has the same digest in either format."""
        rows = [[prompt.id, prompt.text] for prompt in self.prompts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def texts(self) -> list[str]:
        """The prompts alone."""
        return [prompt.text for prompt in self.prompts]


def read_prompts(file: Path) -> PromptList:
    """Reads a prompt file.

    Lines of spaces are skipped in text files.

    Raises:
        ConfigError: the file does not exist, or its name ends in neither .txt nor .json.
        DataError: it cannot be read, is malformed, or holds no prompt.
    """
    file = home_expanded(str(file), ConfigError)
    if file.suffix.lower() not in (".txt", ".json"):
        raise ConfigError(f"--prompts {file}: not a .txt or .json file; {_FORMS}")
    if not file.is_file():
        raise ConfigError(f"--prompts {file}: the file does not exist")
    try:
        entries: Any = _lines(file) if file.suffix.lower() == ".txt" else read_json(file, most=_MOST_BYTES)
    except OSError as problem:
        raise DataError(f"{file}: cannot be read ({problem.strerror})") from problem
    except ValueError as problem:
        raise DataError(f"{file}: malformed ({problem}); {_FORMS}") from problem
    if not isinstance(entries, list):
        raise DataError(f"{file}: holds a JSON {type(entries).__name__} instead of a list; {_FORMS}")
    if not entries:
        raise DataError(f"{file}: holds no prompt; {_FORMS}")
    return PromptList(file.name, tuple(_prompt(file, place, entry) for place, entry in enumerate(entries)))


def _lines(file: Path) -> list[str]:
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes, the limit is {_MOST_BYTES}")
    # Not splitlines, which also splits at separators such as U+2028 that may be part of a prompt.
    lines = file.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _prompt(file: Path, place: int, entry: Any) -> Prompt:
    where, found = f"{file}: record {place + 1}", str(place)
    if isinstance(entry, dict):
        key = next((name for name in _TEXTS if name in entry), None)
        if key is None:
            raise DataError(f"{where} has none of the keys {', '.join(_TEXTS)}; {_FORMS}")
        found = next(
            (str(entry[name]) for name in _IDS if isinstance(entry.get(name), str | int) and entry[name] != ""), found
        )
        entry = entry[key]
    if not isinstance(entry, str):
        raise DataError(f"{where}: the prompt is {_shown(entry)}, which is not text; {_FORMS}")
    if not entry.strip():
        raise DataError(f"{where}: the prompt is empty; remove the record or give it a prompt")
    try:
        entry.encode()
    except UnicodeEncodeError as problem:  # JSON may spell half of a surrogate pair
        raise DataError(f"{where}: the prompt is not valid Unicode ({problem.reason}); fix the record") from problem
    return Prompt(found, entry)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
