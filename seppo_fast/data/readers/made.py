"""Pictures that the embedded pipeline made, as a data set: labelled pairs, or winners alone."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np

from seppo_fast.data.examples import Example, Source
from seppo_fast.data.media.images import ImageRef
from seppo_fast.shapes import made
from seppo_fast.utils.random import keyed_rng

_TAKES = 4  # pictures of a prompt, of which the best and one other are kept


class MadeShapesSource(Source):
    """The first `count` prompts of `seppo_fast.shapes.made`; the winner is the best of four pictures.

    The other picture is the loser where the judge scores it lower. Where both tie there is a winner alone, which
    `labelled` leaves out.

    Args:
        spec: what the user wrote.
        count: prompts, at most `made.COUNT`.
        at_random: take one of the four pictures at random, and no losers: what the best is to be compared with.
        pairs: leave out ties, so that every example has a loser.
    """

    def __init__(self, spec: str, count: int, at_random: bool = False, pairs: bool = False) -> None:
        super().__init__(spec, has_losers=pairs)
        self._count, self._at_random = count, at_random
        scores = made.load().scores
        self._wins = scores["best"][:count] > scores["other"][:count]
        self._kept = np.flatnonzero(self._wins) if pairs else np.arange(count)
        self.ties = count - len(self._kept)
        if self.ties:
            self.notes.append(f"{self.ties} of {count} pairs are ties and are not used")

    def __len__(self) -> int:
        return len(self._kept)

    def labelled(self) -> Source:
        """See `Source.labelled`; pictures taken at random stay as they are and have no losers."""
        return self if self._at_random else MadeShapesSource(self.spec, self._count, pairs=True)

    def _example(self, index: int) -> Example:
        row = int(self._kept[index])
        # The other one was drawn among the remaining three, so that each of the four is as likely.
        best = not self._at_random or keyed_rng(0, "shapes-made", row).random() < 1 / _TAKES
        winner = self._picture("best" if best else "other", row)
        loser = self._picture("other", row) if self._wins[row] and not self._at_random else None
        return Example(f"shapes-made-{row}", made.load().prompts[row], winner, loser)

    def _picture(self, role: str, row: int) -> ImageRef:
        return ImageRef(f"shapes-made-{row} {role}", partial(made.picture, role, row))

    def digest(self) -> str:
        """Over the pictures and prompts as they ship, and which of them are taken."""
        return hashlib.sha256(
            f"shapes-made {self._count} {self._at_random} {self.has_losers} {made.digest()}".encode()
        ).hexdigest()
