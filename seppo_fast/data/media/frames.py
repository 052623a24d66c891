"""Dynamic frame extraction: which frames of a clip are taken, by their numbers or by their times."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

STRIDE = 4
"""Frames of the clip from one frame of a window to the next (the paper's setting for AnimateDiff)."""
STEP = Fraction(STRIDE, 30)
"""Seconds, of those windows in clips of 30 frames a second, as most of AnimateDiff's training clips have."""


@dataclass(frozen=True)
class Choice:
    """How `frames` frames of a clip are chosen; see `choose_frames` and `choose_times`."""

    frames: int
    whole: bool
    by_number: bool
    key: str

    def places(self, times: Sequence[int], unit: Fraction) -> list[int]:
        """Which of the frames shown at these times are taken, in order."""
        if self.by_number:
            return choose_frames(len(times), self.frames, whole=self.whole, key=self.key)
        return choose_times(times, unit, self.frames, whole=self.whole, key=self.key)

    def remarks(self, times: Sequence[int], unit: Fraction, places: Sequence[int]) -> tuple[str, ...]:
        """What is remarkable of that: frames that repeat, or that a window has closer together than usual."""
        if len(set(places)) < len(places):
            return ("repeating",)
        short = len(times) <= STRIDE * (self.frames - 1) if self.by_number else is_short(times, unit, self.frames)
        return ("closer",) if short and not self.whole else ()


def choose_frames(length: int, frames: int, *, whole: bool, key: str) -> list[int]:
    """By number: which `frames` of a clip's `length` frames are taken, in order, as MagicTime does it.

    Of a time-lapse (`whole`) evenly from its first frame to its last; else a window with stride 4, or the largest
    stride that fits, whose start is a pure function of `key`. A clip with too few frames repeats them evenly.
    """
    if length < frames:
        return [place * length // frames for place in range(frames)]
    if frames == 1:
        return [0 if whole else keyed_choice("window", key, length)]
    if whole:
        return [(2 * place * (length - 1) + frames - 1) // (2 * (frames - 1)) for place in range(frames)]
    stride = min(STRIDE, (length - 1) // (frames - 1))
    span = (frames - 1) * stride + 1
    start = keyed_choice("window", key, length - span + 1)
    return list(range(start, start + span, stride))


def choose_times(times: Sequence[int], unit: Fraction, frames: int, *, whole: bool, key: str) -> list[int]:
    """By time: which frames of those shown at `times` are taken, so that motion is as fast in clips of every rate.

    They are the nearest to equal steps of time, the later one of two as near. Of a time-lapse (`whole`) the steps lead
    from its first frame to its last. Else they are `STEP`, from a frame that is a pure function of `key`, among those
    from which a whole window fits; where none does, the largest steps that fit. Too few frames repeat.

    Args:
        times: when each frame is shown, in ascending order, at least one.
        unit: seconds to one of `times`.
        frames: how many are taken.
        whole: whether it is a time-lapse.
        key: what chooses the window, the example's id.
    """
    if frames == 1:
        return [0 if whole else keyed_choice("window", key, len(times))]
    step = STEP / unit
    start, steps = times[0], frames - 1
    if whole or is_short(times, unit, frames):
        step = Fraction(times[-1] - times[0], steps)
    else:
        start = times[keyed_choice("window", key, bisect_right(times, times[-1] - steps * step))]
    return [_nearest(times, start + place * step) for place in range(frames)]


def is_short(times: Sequence[int], unit: Fraction, frames: int) -> bool:
    """Whether a window of so many frames at `STEP` is longer than the clip."""
    return (times[-1] - times[0]) * unit < (frames - 1) * STEP


def _nearest(times: Sequence[int], wanted: Fraction) -> int:
    after = bisect_left(times, wanted)
    if after == 0:
        return 0
    return after if after < len(times) and times[after] - wanted <= wanted - times[after - 1] else after - 1


def keyed_choice(purpose: str, key: str, choices: int) -> int:
    """A number below `choices`, evenly drawn, that depends on (purpose, key) alone."""
    digest = hashlib.blake2b(repr((purpose, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little") % choices  # of 2^128: the remainder's bias is nothing
