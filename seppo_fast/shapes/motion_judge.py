"""The exact judge of clips: decides which of the attributes in a prompt, and which motion, a clip has.

It uses no network. The judge of pictures finds the thing in every frame; curves of constant, falling or rising speed
fitted to its centroid and to the logarithm of its area tell how it moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .judge import WINDOW, Finding, find, segment
from .motion import DIRECTIONS, STILL, TRAVEL, Action, parse, slowing
from .world import AREAS, COLOURS, SIZE

MOST = 0.75  # least share of frames in which an attribute must be right
# Thresholds derived from the world's own constants. A motion counts if it is at least half as large as the smallest in
# the world, so that no threshold favours one motion. A jump at half time, which is not a motion, deviates from its
# fitted curve by at least a quarter of its height (root mean square); a motion counts as smooth up to three quarters of
# what the smallest jump leaves. Clean clips after the shipped autoencoder miss the true offsets by at most 0.21 pixels
# and 0.14, and deviate by at most 0.12 pixels and 0.06 (300 clips).
LEAST_GROWTH = float(np.log(AREAS["large"][0] / AREAS["small"][1]))
MIN_TRAVEL, MAX_STRAY = TRAVEL[0] / 2, TRAVEL[0] * 3 / 16  # pixels
MIN_GROWTH, MAX_FLICKER = LEAST_GROWTH / 2, LEAST_GROWTH * 3 / 16  # in the logarithm of the area


@dataclass(frozen=True)
class Track:
    """The thing of one colour over the frames of a clip.

    Attributes:
        findings: what the judge of pictures found in each frame.
        areas: square pixels of that colour around the thing, float64 (frames,).
    """

    findings: list[Finding]
    areas: NDArray[np.float64]

    def share(self, name: str, value: object) -> float:
        """Returns the share of frames in which attribute `name` of the thing is `value`."""
        return float(np.mean([found.present and getattr(found, name) == value for found in self.findings]))


def judge(prompt: str, clip: NDArray[np.uint8]) -> dict[str, bool]:
    """Decides for each attribute in `prompt` whether `clip` has it.

    For "a small red circle moves left" the keys of the result are "red", "red circle", "small red" and "red moves
    left"; the first three must be right in most frames. "a red circle grows" has no entry for a size.

    Args:
        prompt: a caption of the world of clips.
        clip: uint8 RGB of shape (F, SIZE, SIZE, 3), at least two frames.

    Raises:
        ValueError: `prompt` is not a caption of the world of clips, or `clip` has another shape or dtype.
    """
    return judge_all([prompt], np.asarray(clip)[None])[0]


def score(prompt: str, clip: NDArray[np.uint8]) -> float:
    """Returns the share of the prompt's attributes that `clip` has; 1.0 means all. Raises as `judge`."""
    return float(np.mean(list(judge(prompt, clip).values())))


def score_all(prompts: Sequence[str], clips: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the `score` of n prompts with n clips (n, F, SIZE, SIZE, 3) as float64 (n,)."""
    return np.array([np.mean(list(entries.values())) for entries in judge_all(prompts, clips)])


def judge_all(prompts: Sequence[str], clips: NDArray[np.uint8]) -> list[dict[str, bool]]:
    """Returns the result of `judge` for n prompts with n clips (n, F, SIZE, SIZE, 3). Raises as `judge`."""
    clips = np.asarray(clips)
    wanted = (len(prompts), *clips.shape[1:2], SIZE, SIZE, 3)
    if clips.ndim != 5 or clips.shape != wanted or clips.dtype != np.uint8 or clips.shape[1] < 2:
        raise ValueError(
            f"clip must be uint8 of shape (at least 2 frames, {SIZE}, {SIZE}, 3), one per prompt, "
            f"got {clips.dtype} {clips.shape} for {len(prompts)} prompts"
        )
    actions = [parse(prompt) for prompt in prompts]
    return [_entries(action, track(clip, action.colour)) for action, clip in zip(actions, clips, strict=True)]


def track(clip: NDArray[np.uint8], colour: str) -> Track:
    """Follows the thing of `colour` through the frames of a clip (F, SIZE, SIZE, 3)."""
    findings = find(clip, range(len(clip)), [colour] * len(clip))
    alpha = segment(clip)[..., list(COLOURS).index(colour)]
    ticks = np.arange(SIZE) + 0.5
    near = [(abs(ticks - found.y) <= WINDOW / 2)[:, None] & (abs(ticks - found.x) <= WINDOW / 2) for found in findings]
    return Track(findings, np.where(near, alpha, 0).sum((1, 2), dtype=np.float64))


def motion_of(track: Track) -> str:
    """Returns the one of `MOTIONS` that a track shows, or "" if the thing is missing, jumps, or does two at once."""
    present = np.array([found.present for found in track.findings])
    if present.mean() < MOST or present.sum() < 2:
        return ""
    time = np.linspace(0, 1, len(present))[present]
    values = np.array([(found.x, found.y) for found in track.findings])[present]
    lines = np.column_stack([values, np.log(track.areas[present])])
    limits = (MAX_STRAY, MAX_STRAY, MAX_FLICKER)
    paces = (time, slowing(time), 1 - slowing(1 - time))
    offsets, stray = min((_fitted(pace, lines) for pace in paces), key=lambda fit: max(fit[1] / limits))
    if np.any(stray > limits):
        return ""
    dx, dy, growth = offsets
    way = [int(np.sign(offset)) if abs(offset) >= MIN_TRAVEL else 0 for offset in (dx, dy)]
    if abs(growth) >= MIN_GROWTH:
        return ("grows" if growth > 0 else "shrinks") if way == [0, 0] else ""
    ways = {STILL: (0, 0), **DIRECTIONS}
    return next((name for name, expected in ways.items() if list(expected) == way), "")


def _fitted(pace: NDArray[np.float64], lines: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fits n time series (F, n) by a constant plus an offset times `pace` (F,), which runs from 0 to 1.

    Returns:
        The offsets (n,), and the deviations from the fit (n,), root mean square.
    """
    design = np.column_stack([pace, np.ones_like(pace)])
    fitted = np.linalg.lstsq(design, lines, rcond=None)[0]
    return fitted[0], np.sqrt(np.mean((lines - design @ fitted) ** 2, axis=0))


def _entries(action: Action, track: Track) -> dict[str, bool]:
    entries = {
        action.colour: track.share("present", True) >= MOST,
        f"{action.colour} {action.shape}": track.share("shape", action.shape) >= MOST,
    }
    if action.size:
        entries[f"{action.size} {action.colour}"] = track.share("size", action.size) >= MOST
    return entries | {f"{action.colour} {action.motion}": motion_of(track) == action.motion}
