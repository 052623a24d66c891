"""What every kind of data set looks like to the rest: a list of examples that decodes nothing up front."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from seppo_fast.data.media.images import ImageRef
from seppo_fast.utils.errors import DataError


@dataclass(frozen=True)
class Example:
    """One prompt with its winner, and its loser where the data set holds labelled pairs.

    Attributes:
        id: Unique in its data set and stable across machines; messages name it.
        prompt: The caption, stripped of surrounding white space, never empty.
        image: The winner: an image, or a clip where the source holds clips.
        loser: The rejected image of a labelled pair, or None.
        time_lapse: A clip whose frames are to be taken from all of it, first to last, not from a window.
        by_number: A clip whose frames are to be chosen by their numbers, as MagicTime does, not by their times.
        number: A label or a score of the example, where the data set has one; then part of the source's digest.
    """

    id: str
    prompt: str
    image: ImageRef
    loser: ImageRef | None = None
    time_lapse: bool = False
    by_number: bool = False
    number: float | None = None


def printable(text: str) -> str:
    """`text` on one line for a terminal: names in files may hold surrogates, which print refuses, or control codes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


@dataclass(frozen=True)
class Problem:
    """One example that cannot be used.

    Attributes:
        id: Which one.
        reason: Why, with the file's name where there is one. Id and reason are part of a cache's key.
        hint: What to do about it, where that is known; no part of the key.
    """

    id: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return printable(f"{self.id}: {self.reason}{f'; {self.hint}' if self.hint else ''}")


class Source(ABC):
    """A list of `Example`s: length, index, iteration, all without decoding an image.

    Attributes:
        spec: What the user wrote.
        has_losers: Whether every example has a `loser`.
        clips: Whether the examples are clips; else they are images.
        problems: Examples already known to be unusable from names, captions and labels alone; not in the list.
        ties: Labelled pairs left out because neither image won.
        notes: Sentences for the user on what was read and what was left out.
    """

    clips: bool = False

    def __init__(self, spec: str, has_losers: bool = False) -> None:
        self.spec = spec
        self.has_losers = has_losers
        self.problems: list[Problem] = []
        self.ties = 0
        self.notes: list[str] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _example(self, index: int) -> Example:
        """The example at `index`, which is in range and not negative."""

    def labelled(self) -> Source:
        """Returns the data for an objective that needs pairs: where some examples have losers, those alone."""
        return self

    @abstractmethod
    def digest(self) -> str:
        """sha256 (hex) over everything in the data set that a cache of it depends on; the same wherever it lies."""

    def __getitem__(self, index: int) -> Example:
        return self._example(range(len(self))[index])

    def __iter__(self) -> Iterator[Example]:
        return (self._example(index) for index in range(len(self)))


def require_kind(source: Source, frames: int | None) -> None:
    """Raises DataError unless the source holds clips exactly where `frames` of each are asked for."""
    if source.clips and frames is None:
        raise DataError(
            f"{source.spec} holds clips, and this model makes images: set model.motion_adapter to train on clips, or "
            "set data.source to images."
        )
    if frames is not None and not source.clips:
        raise DataError(
            f"{source.spec} holds images, and a model with a motion adapter is trained on clips: set data.source to "
            "clips, or leave model.motion_adapter empty to train on images."
        )
