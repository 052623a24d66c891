"""Reads the files of answers that raters saved, and refuses those that do not belong to a study."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from seppo_fast.evaluation.human.plan import Trial
from seppo_fast.evaluation.human.study import Study
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import read_json

PATTERN = "answers-*.json"
Side = Literal["left", "same", "right"]
_SIDES = ("left", "same", "right")
_SCHEMA = 1
_MOST_BYTES = 1 << 24
_MOST_MILLISECONDS = 1 << 40


class Vote(NamedTuple):
    """An answer to one question about one trial.

    Attributes:
        side: the preferred side, or `same`.
        choice: the preferred medium: 0 for the first model, 1 for the second, 2 for "about the same". For attention
            checks 0 is the obvious winner and 1 its opponent.
        milliseconds: the time between the question's appearance and the answer.
    """

    side: Side
    choice: int
    milliseconds: int


@dataclass(frozen=True)
class Answers:
    """The answers of one rater.

    Attributes:
        rater: the rater's name.
        trials: the rater's trials in order.
        votes: the answers, by the trial's number and the question.
    """

    rater: str
    trials: Sequence[Trial]
    votes: Mapping[tuple[int, str], Vote]


def read_answers(folder: Path, study: Study) -> list[Answers]:
    """Reads all `answers-*.json` in a folder; raters without answers are left out.

    Raises:
        ConfigError: the folder has no such file.
        DataError: a file is malformed, was changed after it had been saved, belongs to another study, or a rater
            has two files. The message names every such file, and nothing is tallied.
    """
    files = sorted(folder.glob(PATTERN))
    if not files:
        raise ConfigError(f"{folder}: no {PATTERN}; copy the files that the raters saved into this folder")
    found: dict[str, tuple[Path, Answers]] = {}
    refused = []
    for file in files:
        try:
            answers = _answers(read_json(file, _MOST_BYTES), study)
            if answers.rater in found:
                raise ValueError(
                    f"{answers.rater} has answered in {found[answers.rater][0].name} too; keep one of them"
                )
            found[answers.rater] = file, answers
        except (OSError, ValueError) as problem:
            refused.append(f"{file.name}: {problem}")
    if refused:
        lines = "".join(f"\n  {line}" for line in refused)
        raise DataError(f"{folder}: {len(refused)} of {len(files)} files of answers are refused; remove them:{lines}")
    return [found[name][1] for name in study.raters if name in found and found[name][1].votes]


def answers_digest(study: str, rater: str, rows: Sequence[Sequence[Any]]) -> str:
    """Returns the digest of a file of answers, as the page computes it.

    It detects damage and careless edits. It does not stop a rater who recomputes it, which the public page allows.
    """
    lines = [study, rater, *(",".join(map(str, row)) for row in rows)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _answers(tree: Any, study: Study) -> Answers:
    """Returns the content of a file; raises ValueError with the reason to refuse it."""
    if not isinstance(tree, dict) or tree.get("schema") != _SCHEMA:
        raise ValueError(f"not a file of answers with schema {_SCHEMA}")
    if tree.get("study") != study.id:
        raise ValueError(f"belongs to study {tree.get('study')!r:.60}, the key to {study.id!r}")
    rater, rows = tree.get("rater"), tree.get("answers")
    if not isinstance(rater, str) or rater not in study.raters:
        raise ValueError(f"the rater {rater!r:.60} is not in the study; it has {', '.join(study.raters)}")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 4 for row in rows):
        raise ValueError("answers must be a list of [trial, question, choice, milliseconds]")
    if tree.get("digest") != answers_digest(study.id, rater, rows):
        raise ValueError("was changed after it had been saved: its digest does not match")
    trials = study.raters[rater]
    votes: dict[tuple[int, str], Vote] = {}
    for row in rows:
        place, question, vote = _vote(row, trials, study)
        if (place, question) in votes:
            raise ValueError(f"trial {place} has two answers to {question}")
        votes[place, question] = vote
    return Answers(rater, trials, votes)


def _vote(row: Sequence[Any], trials: Sequence[Trial], study: Study) -> tuple[int, str, Vote]:
    place, question, side, milliseconds = row
    if type(place) is not int or not 0 <= place < len(trials):
        raise ValueError(f"trial {place!r:.60} does not exist")
    if question not in study.questions:
        raise ValueError(f"question {question!r:.60} is not in the study")
    if side not in _SIDES:
        raise ValueError(f"choice {side!r:.60}: expected left, same or right")
    if type(milliseconds) is not int or not 0 <= milliseconds <= _MOST_MILLISECONDS:
        raise ValueError(f"milliseconds {milliseconds!r:.60}: expected a number from 0 on")
    trial = trials[place]
    first_left = trial.good == "left" if trial.good else trial.left.model == study.models[0]
    choice = 2 if side == "same" else int((side == "left") != first_left)
    return place, question, Vote(cast(Side, side), choice, milliseconds)
