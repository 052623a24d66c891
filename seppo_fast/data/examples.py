"""The common interface of all data sets: a list of examples that decodes nothing up front."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from seppo_fast.data.media.images import ImageRef
from seppo_fast.utils.errors import DataError


@dataclass(frozen=True)
class Example:
    """One prompt with its winner and, in labelled pairs, its loser.

    Attributes:
        id: An id that is unique in the data set and the same on every machine; messages show it.
        prompt: The caption, stripped of surrounding white space, never empty.
        image: The winner: an image, or a clip if the source holds clips.
        loser: The rejected image of a labelled pair, or None.
        time_lapse: Whether a clip's frames are spread over the whole clip, first to last, not taken from a window.
        by_number: Whether a clip's frames are chosen by their numbers, as MagicTime does, not by their times.
        number: The example's label or score, or None; if set, part of the source's digest.
    """

    id: str
    prompt: str
    image: ImageRef
    loser: ImageRef | None = None
    time_lapse: bool = False
    by_number: bool = False
    number: float | None = None


def printable(text: str) -> str:
    """Escapes what is unprintable: file names may hold surrogates, which `print` rejects, control codes or newlines."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def counted(count: int, one: str, many: str) -> str:
    """Returns `1 image` or `2 images`; the words may include the verb: `1 image is`, `2 images are`."""
    return f"{count} {one if count == 1 else many}"


def ties_note(ties: int, pairs: int) -> str:
    """Returns the note of a source of labelled pairs that leaves out ties."""
    are = "is a tie and is" if ties == 1 else "are ties and are"
    return f"{ties} of {counted(pairs, 'pair', 'pairs')} {are} not used"


@dataclass(frozen=True)
class Problem:
    """One example that cannot be used.

    Attributes:
        id: The example's id, or the place of a malformed row such as `metadata.csv:3`.
        reason: Why it cannot be used. Id and reason may be part of a cache's key: rewording them causes re-encoding.
        hint: What to do about it, or empty; never part of the key.
    """

    id: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        return printable(f"{self.id}: {self.reason}{f'; {self.hint}' if self.hint else ''}")


class Source(ABC):
    """A data set as a list of `Example`s; length, indexing and iteration decode no image.

    Attributes:
        spec: `data.source` as the user wrote it.
        has_losers: Whether every example has a `loser`.
        clips: Whether the examples are clips, not images.
        prompts_only: Whether the images are placeholders, from which nothing can be learned.
        problems: The examples found unusable from names, captions and labels alone; they are not in the list.
        ties: The number of labelled pairs left out because neither image won.
        notes: Messages for the user about what was ignored or left out.
    """

    clips: bool = False
    prompts_only: bool = False

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
        """Returns the example at `index`, which is in range and not negative."""

    def labelled(self) -> Source:
        """Returns the source to use if pairs are needed: if only some examples have losers, just those."""
        return self

    def labels(self) -> list[tuple[str, object]]:
        """Returns each example's id and its label as the data has it, None if it is missing.

        Raises:
            DataError: This kind of data cannot have labels.
        """
        raise DataError(
            f"{self.spec}: no labels are read from this kind of data. Use a folder with metadata.jsonl or "
            "metadata.csv, parquet files or a hub data set with a label in each row, or labelled pairs."
        )

    @abstractmethod
    def digest(self) -> str:
        """Returns the sha256 (hex) over all data that a cache depends on, wherever the data set is stored."""

    def __getitem__(self, index: int) -> Example:
        return self._example(range(len(self))[index])

    def __iter__(self) -> Iterator[Example]:
        return (self._example(index) for index in range(len(self)))


def require_kind(source: Source, frames: int | None) -> None:
    """Raises DataError if the source holds clips but `frames` is None, or images but `frames` is set."""
    if source.clips and frames is None:
        raise DataError(
            f"{source.spec} holds clips, but this model makes images: set model.motion_adapter to train on clips, or "
            "set data.source to images."
        )
    if frames is not None and not source.clips:
        raise DataError(
            f"{source.spec} holds images, but a model with a motion adapter is trained on clips: set data.source to "
            "clips, or leave model.motion_adapter empty to train on images."
        )
