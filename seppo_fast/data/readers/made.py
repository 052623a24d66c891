"""The data set of pictures that the embedded pipeline made: labelled pairs, or winners only."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np

from seppo_fast.data.examples import Example, Source, ties_note
from seppo_fast.data.media.images import ImageRef
from seppo_fast.shapes import made
from seppo_fast.utils.random import keyed_rng

_TAKES = 4  # pictures made per prompt; the package ships the best and one other


class MadeShapesSource(Source):
    """The first `count` prompts of `seppo_fast.shapes.made`; the winner is the best of four pictures.

    The other shipped picture is the loser if the judge scores it lower. If both tie, the example has a winner only, and
    `labelled` leaves it out.

    Args:
        spec: `data.source` as the user wrote it.
        count: the number of prompts, at most `made.COUNT`.
        at_random: whether to take one of the four pictures at random and no losers, as a control for the best.
        pairs: whether to leave out ties, so that every example has a loser.
    """

    def __init__(self, spec: str, count: int, at_random: bool = False, pairs: bool = False) -> None:
        super().__init__(spec, has_losers=pairs)
        self._count, self._at_random = count, at_random
        scores = made.load().scores
        self._wins = scores["best"][:count] > scores["other"][:count]
        self._kept = np.flatnonzero(self._wins) if pairs else np.arange(count)
        self.ties = count - len(self._kept)
        if self.ties:
            self.notes.append(ties_note(self.ties, count))

    def __len__(self) -> int:
        return len(self._kept)

    def labelled(self) -> Source:
        """Returns the pairs without ties, see `Source.labelled`; or self if pictures are taken at random."""
        return self if self._at_random else MadeShapesSource(self.spec, self._count, pairs=True)

    def _example(self, index: int) -> Example:
        row = int(self._kept[index])
        # The other picture was drawn from the remaining three, so each of the four is equally likely.
        best = not self._at_random or keyed_rng(0, "shapes-made", row).random() < 1 / _TAKES
        winner = self._picture("best" if best else "other", row)
        loser = self._picture("other", row) if self._wins[row] and not self._at_random else None
        return Example(f"shapes-made-{row}", made.load().prompts[row], winner, loser)

    def _picture(self, role: str, row: int) -> ImageRef:
        return ImageRef(f"shapes-made-{row} {role}", partial(made.picture, role, row))

    def digest(self) -> str:
        """Digests the shipped pictures and prompts, and which of them are used."""
        return hashlib.sha256(
            f"shapes-made {self._count} {self._at_random} {self.has_losers} {made.digest()}".encode()
        ).hexdigest()
