"""Whether the policy is worse at the winners than its past policies, over a window of updates."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 20
LARGEST = 1e100
"""What is larger counts as not finite; sums and squares of the rest do not overflow."""
_STANDARD_ERRORS = 3.0


class WinnerWatch:
    """Says when the winner's error stays above the reference's, from the numbers of the log alone.

    An update's difference is the mean of D_w = m_w - r_w over its pairs, both errors at the same noised winners.
    SePPO holds where D_w falls to 0 and below: there a pair rejects, and the reject rate rises as training succeeds.
    A mean above 0 alone says little: at the start every difference is exactly 0, and in runs of the embedded world
    that end well it lies a little above 0 about as often as below. So a spell begins where the mean over the last
    `WINDOW` differences is above 0 by more than three of its standard errors, and ends where it is no longer above 0.

    Updates whose errors are not finite do not count; of an objective without a reference none does.
    """

    def __init__(self) -> None:
        self._differences: deque[float] = deque(maxlen=WINDOW)
        self.above = False

    def see(self, entry: Mapping[str, Any]) -> bool:
        """Takes the next update; returns whether a spell begins with it. `above`: whether it is within one."""
        errors: list[Any] = [entry.get(name) for name in ("winner_error", "ref_winner_error")]
        if not all(isinstance(error, int | float) and abs(error) <= LARGEST for error in errors):
            return False
        self._differences.append(errors[0] - errors[1])
        if len(self._differences) < WINDOW:
            return False
        mean = statistics.fmean(self._differences)
        before = self.above
        margin = 0.0 if before else _STANDARD_ERRORS * statistics.stdev(self._differences) / math.sqrt(WINDOW)
        self.above = mean > margin
        return self.above and not before


def spells(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """First and last update of each time that the winner's error stayed above the reference's."""
    watch, found = WinnerWatch(), list[tuple[int, int]]()
    for entry in entries:
        if watch.see(entry):
            found.append((entry["update"], entry["update"]))
        elif watch.above:
            found[-1] = found[-1][0], entry["update"]
    return found
