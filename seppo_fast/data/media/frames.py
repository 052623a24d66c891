"""Dynamic frame extraction: selects a clip's frames by their numbers or by their times."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

STRIDE = 4
"""The distance in frames between consecutive frames of a window (the paper's setting for AnimateDiff)."""
STEP = Fraction(STRIDE, 30)
"""The same distance in seconds, at the 30 frames per second that most of AnimateDiff's training clips have."""


@dataclass(frozen=True)
class Choice:
    """The rule by which `frames` frames of a clip are chosen; see `choose_frames` and `choose_times`."""

    frames: int
    whole: bool
    by_number: bool
    key: str

    def places(self, times: Sequence[int], unit: Fraction) -> list[int]:
        """Returns the indices of the chosen frames, in order, given the times at which all frames are shown."""
        if self.by_number:
            return choose_frames(len(times), self.frames, whole=self.whole, key=self.key)
        return choose_times(times, unit, self.frames, whole=self.whole, key=self.key)

    def remarks(self, times: Sequence[int], unit: Fraction, places: Sequence[int]) -> tuple[str, ...]:
        """Returns the remarks on this choice: repeated frames, or a window with frames closer together than usual."""
        if len(set(places)) < len(places):
            return ("repeating",)
        short = len(times) <= STRIDE * (self.frames - 1) if self.by_number else is_short(times, unit, self.frames)
        return ("closer",) if short and not self.whole else ()


def choose_frames(length: int, frames: int, *, whole: bool, key: str) -> list[int]:
    """Chooses `frames` of a clip's `length` frames by number, as MagicTime does; returns their indices in order.

    A time-lapse (`whole`) is sampled evenly from its first frame to its last. Otherwise the frames form a window with
    stride 4, or the largest stride that fits, whose start is a pure function of `key`. A clip with fewer frames than
    requested repeats them evenly.
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
    """Chooses frames by time, so that motion is equally fast whatever the clip's frame rate; returns their indices.

    The chosen frames are the nearest to equally spaced times (the later of two equally near ones). For a time-lapse
    (`whole`) these times run from the first frame to the last. Otherwise they are `STEP` apart and begin at a frame
    that is a pure function of `key`, among those from which a whole window fits; if the clip is shorter than a window,
    they are spread over the whole clip. A clip with too few frames repeats some.

    Args:
        times: the time at which each frame is shown, in ascending order; at least one.
        unit: the length in seconds of one unit of `times`.
        frames: the number of frames to choose.
        whole: whether the clip is a time-lapse.
        key: the example's id, which determines the window.
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
    """Returns whether a window of this many frames, `STEP` apart, is longer than the clip."""
    return (times[-1] - times[0]) * unit < (frames - 1) * STEP


def _nearest(times: Sequence[int], wanted: Fraction) -> int:
    after = bisect_left(times, wanted)
    if after == 0:
        return 0
    return after if after < len(times) and times[after] - wanted <= wanted - times[after - 1] else after - 1


def keyed_choice(purpose: str, key: str, choices: int) -> int:
    """Returns an evenly distributed number below `choices` that depends on (purpose, key) alone."""
    digest = hashlib.blake2b(repr((purpose, key)).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little") % choices  # the bias is negligible for a digest of 128 bits
