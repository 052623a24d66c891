"""Labels of single examples, liked or disliked, for objectives that learn from them; other objectives ignore them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from seppo_fast.data.examples import Example, Source, counted, printable
from seppo_fast.utils.errors import DataError

_SPELLINGS = {"1 or 0": ("1", "0"), "true or false": ("true", "false"), "like or dislike": ("like", "dislike")}
_READ = {
    word: (spelling, number)
    for spelling, pair in _SPELLINGS.items()
    for word, number in zip(pair, (1.0, 0.0), strict=True)
}
_SHOWN = 5  # examples that a message names


def with_labels(source: Source) -> Source:
    """Returns a source of single examples whose `number` is 1 if liked, 0 if disliked.

    Labelled pairs become two examples each: the winner, which is liked, and the loser, which is not. If no example can
    be used, the result is empty: the source's problems say why, which its labels do not.

    Raises:
        DataError: the source has neither pairs nor labels, or its labels cannot be used; see `liked`.
    """
    pairs = source.labelled()
    if pairs.has_losers:
        return LabelledSource(pairs, None)
    return LabelledSource(source, liked(source.spec, source.labels()) if len(source) else [])


def liked(spec: str, labels: Sequence[tuple[str, object]]) -> list[float]:
    """Returns 1 for each label that says liked, and 0 for each that says disliked.

    Labels are 1 or 0, true or false, like or dislike, in upper or lower case, but all of one kind.

    Args:
        spec: the data set's name, for messages.
        labels: each example's id and label, which is None or NaN if missing.

    Raises:
        DataError: labels are missing, cannot be understood, are of several kinds, or all say the same; the message
            names examples.
    """
    words = [(id, _word(label)) for id, label in labels]
    wanted = "label, which is 1 or 0, true or false, or like or dislike"
    missing = [id for id, word in words if word is None]
    if len(missing) == len(words):
        raise DataError(
            f"{spec}: no example has a label. Give each row of metadata.jsonl, metadata.csv or the table a {wanted}."
        )
    if missing:
        raise DataError(f"{spec}: {_named(missing, len(words))} no label. Give each row a {wanted}.")
    unknown = [f"{id} ({word})" for id, word in words if word not in _READ]
    if unknown:
        raise DataError(f"{spec}: {_named(unknown, len(words))} an unknown label. Give each row a {wanted}.")
    read = [(id, *_READ[word]) for id, word in words if word is not None]
    first = {spelling: id for id, spelling, _ in reversed(read)}
    if len(first) > 1:
        kinds = ", ".join(f"{spelling} ({printable(id)})" for spelling, id in first.items())
        raise DataError(f"{spec}: labels are of several kinds: {kinds}. Write all of them in one way.")
    numbers = [number for _, _, number in read]
    if len(set(numbers)) == 1:
        kind = "liked" if numbers[0] else "disliked"
        raise DataError(
            f"{spec}: all {counted(len(numbers), 'example', 'examples')} are {kind}, the first is "
            f"{printable(read[0][0])}. Learning from labels needs liked and disliked examples; with liked ones alone, "
            "use objective: sft."
        )
    return numbers


def _word(label: object) -> str | None:
    """Returns a label as a word of `_READ` if it is one; None if it is missing."""
    if label is None or label != label or (isinstance(label, str) and not label.strip()):
        return None
    word = str(label).strip().lower()
    return {"1.0": "1", "0.0": "0"}.get(word, word)  # a column of numbers with gaps is written as floats


def _named(ids: Sequence[str], total: int) -> str:
    """Returns `3 of 9 examples (a.png, b.png, ...) have`."""
    shown = ", ".join(printable(id) for id in ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
    return f"{len(ids)} of {counted(total, 'example', 'examples')} ({shown}) {'has' if len(ids) == 1 else 'have'}"


class LabelledSource(Source):
    """The examples of another source with their labels, or both pictures of its pairs.

    Args:
        source: the other source.
        numbers: the label of each of its examples; None to take its pairs apart.
    """

    def __init__(self, source: Source, numbers: Sequence[float] | None) -> None:
        super().__init__(source.spec)
        self._source, self._numbers = source, numbers
        self.clips, self.ties = source.clips, source.ties
        self.problems, self.notes = source.problems, source.notes
        if numbers is None:  # as many as the pictures that they cost, of which at most 1 % may be left out
            self.problems = [replace(bad, id=id) for bad in source.problems for id in (bad.id, _loser_id(bad.id))]

    def __len__(self) -> int:
        return len(self._source) * (2 if self._numbers is None else 1)

    def _example(self, index: int) -> Example:
        if self._numbers is not None:
            return replace(self._source[index], loser=None, number=self._numbers[index])
        row, loser = divmod(index, 2)
        example = self._source[row]
        assert example.loser is not None
        if loser:
            return replace(example, id=_loser_id(example.id), image=example.loser, loser=None, number=0.0)
        return replace(example, loser=None, number=1.0)

    def digest(self) -> str:
        """Digests the other source and the labels."""
        return hashlib.sha256(json.dumps([self._source.digest(), self._numbers]).encode()).hexdigest()


def _loser_id(id: str) -> str:
    """Returns the id of the second picture of a pair that is taken apart."""
    return f"{id} loser"
