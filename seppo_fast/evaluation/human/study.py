"""A drawn study, and `key.json`, the file that says which model is on which side of each trial."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from seppo_fast.evaluation.human.items import Material
from seppo_fast.evaluation.human.plan import Kind, Shown, Trial, choose, trials
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import read_json

KEY = "key.json"
QUESTIONS = {
    "overall": "Overall, which one do you prefer for this prompt?",
    "alignment": "Which one matches the prompt better?",
    "quality": "Which one has the better visual quality, regardless of the prompt?",
    "motion": "Which one has the better motion?",
}
DEFAULT_ITEMS = 100  # at most so many items unless a number is given
DEFAULT_RATERS = ("rater-1", "rater-2", "rater-3")
_SCHEMA = 1
_MOST_BYTES = 1 << 28


@dataclass(frozen=True)
class Study:
    """Everything that has been drawn for a study.

    Attributes:
        models: the two models; results are stated for the second against the first.
        digests: the digests of the two models.
        questions: the names of the questions, in the order in which they are asked.
        seed: the study's seed.
        source: the digest of `items.json`.
        prompts: the prompts of all items that are shown, by item id.
        raters: the trials of each rater in order, by the rater's name.
    """

    models: tuple[str, str]
    digests: tuple[str, str]
    questions: tuple[str, ...]
    seed: int
    source: str
    prompts: Mapping[str, str]
    raters: Mapping[str, Sequence[Trial]]

    @cached_property
    def id(self) -> str:
        """A digest of the study; answers and keys that state another one belong to another study."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    def media(self) -> list[Shown]:
        """Returns every medium that is shown, once each."""
        shown = (side for rows in self.raters.values() for trial in rows for side in (trial.left, trial.right))
        return list(dict.fromkeys(shown))

    def write_key(self, file: Path) -> None:
        """Writes `key.json`; raises OSError."""
        tree = {"schema": _SCHEMA, "study": self.id} | asdict(self)
        file.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def draw_study(
    material: Material,
    models: Sequence[str] | None = None,
    count: int | None = None,
    seed: int = 0,
    raters: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
) -> Study:
    """Draws a study.

    Args:
        material: the generated media.
        models: the two models to compare; None: those of the material, if it has exactly two.
        count: the number of items; None: all, but at most `DEFAULT_ITEMS`.
        seed: seed of all draws.
        raters: the raters' names; None: `DEFAULT_RATERS`.
        questions: names from `QUESTIONS`; None: all, `motion` only for clips.

    Raises:
        ConfigError: an argument is invalid, or more items are requested than exist.
        DataError: media are missing, or pictures and clips are mixed.
    """
    pair = material.pair(models)
    files, media = material.files_of(pair), material.media
    items = media.items
    asked = _questions(questions, clips=next(iter(files.values())).suffix == ".webp")
    raters = DEFAULT_RATERS if raters is None else raters
    _check_raters(raters, pair)
    count = min(len(items), DEFAULT_ITEMS) if count is None else count
    if not 1 <= count <= len(items):
        raise ConfigError(f"--items: expected 1 to {len(items)}, the number of items in the folder, got {count}")
    chosen = choose(items, count, seed, media.digest)
    ids = {item.id for item in chosen}
    spare = [item for item in items if item.id not in ids]
    drawn = {
        name: trials(chosen, spare, pair, number, seed, media.digest, mismatches="alignment" in asked)
        for number, name in enumerate(raters)
    }
    shown = {item for rows in drawn.values() for trial in rows for item in (trial.left.item, trial.right.item)}
    return Study(
        models=pair,
        digests=(media.models[pair[0]], media.models[pair[1]]),
        questions=asked,
        seed=seed,
        source=media.digest,
        prompts={item.id: item.prompt for item in items if item.id in shown},
        raters=drawn,
    )


def media_files(study: Study, material: Material) -> dict[Shown, Path]:
    """Returns the source file of every medium of the study; raises DataError if one is missing."""
    files = material.files_of(study.models)
    return {shown: files[shown.item, shown.model] for shown in study.media()}


def read_key(file: Path) -> Study:
    """Reads `key.json`.

    Raises:
        ConfigError: the file is missing.
        DataError: it is malformed or was changed after it had been written.
    """
    try:
        tree = read_json(file, _MOST_BYTES)
        if not isinstance(tree, dict) or tree.get("schema") != _SCHEMA:
            raise ValueError(f"expected schema {_SCHEMA}")
        study = _study(tree)
        if study.id != tree["study"]:
            raise ValueError("its content does not match its study id: it was changed after it had been written")
        return study
    except FileNotFoundError:
        raise ConfigError(f"{file}: is missing; name the {KEY} that seppo-fast human make wrote") from None
    except KeyError as problem:
        raise DataError(f"{file}: not a key of seppo-fast human make: {problem} is missing") from problem
    except (OSError, ValueError, TypeError, AttributeError) as problem:
        raise DataError(f"{file}: not a key of seppo-fast human make ({problem})") from problem


def _study(tree: Mapping[str, Any]) -> Study:
    """Returns the study of a parsed key; raises KeyError, TypeError, AttributeError or ValueError if malformed."""
    first, second = map(str, tree["models"])
    digest, other = map(str, tree["digests"])
    raters = {name: [_trial(row) for row in rows] for name, rows in tree["raters"].items()}
    questions = tuple(map(str, tree["questions"]))
    if not set(questions) <= set(QUESTIONS):
        raise ValueError("unknown questions")
    return Study(
        (first, second), (digest, other), questions, int(tree["seed"]), str(tree["source"]), tree["prompts"], raters
    )


def _trial(row: Mapping[str, Any]) -> Trial:
    if row["kind"] not in get_args(Kind) or row["good"] not in ("", "left", "right"):
        raise ValueError("unknown kind of trial")
    left, right = (Shown(str(side["item"]), str(side["model"]), bool(side["noise"])) for side in _sides(row))
    return Trial(row["kind"], str(row["item"]), left, right, row["good"])


def _sides(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return row["left"], row["right"]


def _questions(names: Sequence[str] | None, clips: bool) -> tuple[str, ...]:
    allowed = [name for name in QUESTIONS if clips or name != "motion"]
    chosen = tuple(allowed if names is None else names)
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(allowed):
        also = "" if clips else "; motion is for clips"
        raise ConfigError(f"--questions: expected some of {','.join(allowed)}, got {','.join(chosen)!r}{also}")
    return chosen


def _check_raters(names: Sequence[str], models: Sequence[str]) -> None:
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
            raise ConfigError(f"--raters: {name!r}: use 1 to 40 letters, digits, - and _; the name is in a file's name")
        if name in models:
            raise ConfigError(f"--raters: {name!r} is a model's name, which must not be on the page")
    lower = [name.lower() for name in names]
    if not names or len(set(lower)) < len(lower):
        raise ConfigError(f"--raters: expected different names, got {','.join(names)!r}")
