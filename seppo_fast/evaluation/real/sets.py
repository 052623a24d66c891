"""What real pictures or clips have in common, whether they are files or drawn.

Each is brought to the generated size by one rule: the centre square, Lanczos-resampled, and for clips as many frames as
the models generate, evenly spaced from the first to the last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from seppo_fast.evaluation.media.items import READERS, Media
from seppo_fast.utils.errors import DataError
from seppo_fast.utils.progress import progress

_LISTED = 10  # the most names in a message


@dataclass(frozen=True)
class Wanted:
    """What the models generate, with which real pictures are compared.

    Attributes:
        prompts: id and text of each prompt, in the order of the prompt file.
        samples: samples per prompt.
        resolution: the side of a picture in pixels.
        frames: the number of frames of a clip; None for pictures.
    """

    prompts: tuple[tuple[str, str], ...]
    samples: int
    resolution: int
    frames: int | None


def wanted_of(media: Media, protocol: Mapping[str, Any]) -> Wanted:
    """Returns what a folder's media look like, from its items and the protocol in its settings."""
    first = {item.prompt_index: (item.id, item.prompt) for item in media.items if item.sample == 0}
    samples = len({item.sample for item in media.items})
    ordered = tuple(first[place] for place in sorted(first))
    return Wanted(ordered, samples, int(protocol["resolution"]), protocol["frames"])


class RealSet(ABC):
    """Real pictures or clips, which are read one at a time.

    Attributes:
        name: its name in tables.
        names: the name of each picture or clip, for messages.
        wanted: what they are compared with.
    """

    def __init__(self, name: str, names: Sequence[str], wanted: Wanted) -> None:
        self.name, self.names, self.wanted = name, list(names), wanted

    @abstractmethod
    def digest(self, place: int) -> str:
        """Returns the SHA-256 of the content of picture or clip number `place`; raises DataError."""

    @abstractmethod
    def load(self, place: int, *, fitted: bool = True) -> np.ndarray:
        """Decodes picture or clip number `place`; raises DataError.

        Args:
            place: its number.
            fitted: whether a picture is brought to the generated size; clips always are.

        Returns:
            `(H, W, 3)` or `(F, H, W, 3)` uint8.
        """

    @abstractmethod
    def counterparts(self) -> list[int]:
        """Returns the number of each prompt's own picture or clip; raises DataError with the prompts that lack one."""

    @abstractmethod
    def prompt_places(self) -> list[int]:
        """Returns for each picture or clip the place of the prompt that it belongs to, -1 without one."""

    def digests(self) -> list[str]:
        """Returns `digest` of all pictures or clips."""
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self.digest, range(len(self.names))))

    def check(self) -> None:
        """Decodes everything once; raises DataError with the files that cannot be used, and why."""
        problems = []

        def problem(place: int) -> str | None:
            try:
                self.load(place)
            except DataError as error:
                return str(error)
            return None

        total = len(self.names)
        with progress(total, "checked", "real files") as advance, ThreadPoolExecutor(READERS) as readers:
            for found in readers.map(problem, range(total)):
                problems += [] if found is None else [found]
                advance(1)
        if problems:
            raise DataError(f"--real: {len(problems)} of {total} files cannot be used\n{listed(problems)}")


def listed(lines: Sequence[str]) -> str:
    """Returns the first lines, indented, and how many more there are."""
    more = [f"... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return "\n".join(f"  {line}" for line in [*lines[:_LISTED], *more])
