"""The arithmetic of ChronoMagic-Bench: scores from features and tracks that its own scripts make, and its file layout.

PKU-YuanGroup/ChronoMagic-Bench (commit e6b75ff). Its networks are not included: InternVideo2 (MTScore), CoTracker2
(CHScore, weights under CC-BY-NC 4.0) and UMT. docs/metrics.md names the scripts that make the inputs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import ArrayLike

from seppo_fast.evaluation.metrics.frechet import frechet

SAMPLES = 3  # per prompt, in folders "1" to "3"

# MTScore's sentences in the official order: five for ordinary videos, five for time-lapse videos.
ORDINARY = (
    "A conventional video, not a time-condensed video.",
    "A usual video, not an accelerated video sequence.",
    "A normal video, not a time-lapse video.",
    "A standard video, not a time-lapse.",
    "An ordinary video, different from a fast-motion video.",
)
TIME_LAPSE = (
    "A time-lapse video, distinct from a regular recording.",
    "A time-lapse footage, not your typical video.",
    "A fast-motion video, unlike a standard video.",
    "A time-condensed video, not a conventional video.",
    "An accelerated video sequence, not a usual video.",
)
_TOP = 5
_MT_FRAMES = 4

# CHScore: what each statistic is divided by, and its weight.
_LOST = 0.1  # a step of more than this share of the points counts as a cut
_SCALES = {"AMPR": 0.9368749856948853, "MPVR": 0.8997353911399841, "FCR": 0.625, "CMPV": 20.0, "MCMPV": 1.0}
_WEIGHTS = {"AMPR": 0.35, "MPVR": 0.25, "FCR": 0.15, "CMPV": 0.15, "MCMPV": 0.10}

UMT_SIZES = (32, 64, 128, 256, 300, 512, 1024)
UMT_SEEDS = (12, 22, 32, 42)


@dataclass(frozen=True)
class CHScores:
    """CHScore of several clips.

    Attributes:
        scores: `(N,)` float64; NaN for a clip in which no point is ever lost, for which the score is undefined.
        mean: the mean of the defined scores; NaN if all are undefined. A mean of reciprocals: few clips dominate it.
        median: the median in which an undefined score counts as higher than any other; infinite if most are undefined.
        official: the mean by the official rule, in which an undefined score counts as 0, the worst possible one.
        undefined: the number of undefined scores.
    """

    scores: np.ndarray
    mean: float
    median: float
    official: float
    undefined: int


def mtscore_frames(count: int) -> list[int]:
    """Returns the four frames that MTScore sees of a clip: every (count // 4)-th, the first four of them.

    Raises:
        ValueError: `count` is less than 4.
    """
    if count < _MT_FRAMES:
        raise ValueError(f"count: MTScore needs at least {_MT_FRAMES} frames, got {count}")
    step = count // _MT_FRAMES
    return [step * number for number in range(_MT_FRAMES)]


def mtscore(video_features: ArrayLike, text_features: ArrayLike) -> np.ndarray:
    """Computes MTScore of each clip: how much it looks like a time-lapse video.

    The probabilities are softmax(100 cos) over the ten sentences. The score adds up those of the time-lapse sentences
    that are among the five most probable sentences, so it is at most their whole probability. The published number is
    the mean over clips, then over the three samples.

    Args:
        video_features: InternVideo2's features of the clips, `(N, D)`; normalised here.
        text_features: its features of `ORDINARY` and `TIME_LAPSE`, in this order, `(10, D)`; normalised here.

    Returns:
        `(N,)` float64 in [0, 1].

    Raises:
        ValueError: a shape is wrong, or a feature is non-finite or all zero.
    """
    videos, texts = np.asarray(video_features, np.float64), np.asarray(text_features, np.float64)
    count = len(ORDINARY) + len(TIME_LAPSE)
    if videos.ndim != 2 or texts.shape != (count, *videos.shape[1:]):
        raise ValueError(
            f"video_features, text_features: expected (N, D) and ({count}, D), got {videos.shape} and {texts.shape}"
        )
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (videos, texts)]
    if not all(np.isfinite(length).all() and (length > 0).all() for length in lengths):
        raise ValueError("video_features, text_features: each row must be finite and not all zero")
    logits = 100 * (videos / lengths[0]) @ (texts / lengths[1]).T
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :_TOP]
    counted = np.where(top >= len(ORDINARY), np.take_along_axis(probabilities, top, axis=1), 0)
    return counted.sum(axis=1)


def chscore(tracks: ArrayLike, visibility: ArrayLike) -> float:
    """Computes CHScore of one clip: how seldom tracked points disappear. Official rule of 2024-09-30.

    A point is missing in a frame if it is invisible there and its displacement since the first frame, projected on its
    movement from the first to the middle frame, is not positive; points that leave with their own motion do not count.
    With q the share of missing points per frame and dq its steps: AMPR = mean q, MPVR = standard deviation of |dq|
    (unbiased), CMPV = the number of steps with |dq| > 0.1, FCR = CMPV per frame, MCMPV = the largest |dq|. The score is
    1 / (0.35 AMPR / 0.9369 + 0.25 MPVR / 0.8997 + 0.15 FCR / 0.625 + 0.15 CMPV / 20 + 0.10 MCMPV).

    This follows a description of the official script and was not compared with its output. The displacement of a frame
    is read as that from frame 0, the middle frame as number F // 2.

    CMPV is a count, so scores of clips with different numbers of frames do not compare. The tables of the paper
    (arXiv 2406.18522) are of an older definition.

    Args:
        tracks: CoTracker2's points from a 30 x 30 grid on frame 0, `(F, P, 2)` in pixels, F at least 3.
        visibility: whether each is visible, `(F, P)` bool.

    Returns:
        The score, positive; NaN if no point is ever lost (the official script gives 0; see `chscores`).

    Raises:
        ValueError: a shape is wrong, or a track is non-finite.
    """
    points, visible = np.asarray(tracks, np.float64), np.asarray(visibility, bool)
    if points.ndim != 3 or points.shape[2] != 2 or visible.shape != points.shape[:2]:
        raise ValueError(f"tracks, visibility: expected (F, P, 2) and (F, P), got {points.shape} and {visible.shape}")
    frames, count = visible.shape
    if frames < 3 or count < 1 or not np.isfinite(points).all():
        raise ValueError(f"tracks: at least 3 frames of finite points are needed, got {frames} frames, {count} points")
    displacement = points - points[0]
    along = np.sum(displacement * displacement[frames // 2], axis=-1)
    share = np.mean(~visible & (along <= 0), axis=1)
    steps = np.abs(np.diff(share))
    cuts = int(np.sum(steps > _LOST))
    values = {
        "AMPR": share.mean(),
        "MPVR": steps.std(ddof=1),
        "FCR": cuts / frames,
        "CMPV": float(cuts),
        "MCMPV": steps.max(),
    }
    index = sum(_WEIGHTS[name] * value / _SCALES[name] for name, value in values.items())
    return float(1 / index) if index > 0 else float("nan")


def chscores(clips: Sequence[tuple[ArrayLike, ArrayLike]]) -> CHScores:
    """Computes `chscore` of each clip, given as (tracks, visibility), and three ways to sum them up.

    Raises:
        ValueError: as `chscore`, or there are no clips.
    """
    if not clips:
        raise ValueError("clips: at least one is needed")
    scores = np.array([chscore(tracks, visibility) for tracks, visibility in clips])
    lost = np.isnan(scores)
    return CHScores(
        scores=scores,
        mean=float(scores[~lost].mean()) if not lost.all() else float("nan"),
        median=float(np.median(np.where(lost, np.inf, scores))),
        official=float(np.where(lost, 0, scores).mean()),
        undefined=int(lost.sum()),
    )


def umt_fvd(
    samples: Sequence[ArrayLike],
    reference: ArrayLike,
    sizes: Sequence[int] = UMT_SIZES,
    seeds: Sequence[int] = UMT_SEEDS,
) -> dict[int, float]:
    """Computes UMT-FVD with the official subsampling; the published number is the mean of the returned values.

    For each size and seed, the same rows of the generated and of the real features are drawn if there are more rows
    than the size; otherwise all rows are used, so at 150 rows the sizes from 256 on are equal. Covariances are divided
    by N.

    At size 32 and 768 features a distance is nearly all bias: compare values under this recipe only, and beside the
    same distance between two halves of real features.

    Args:
        samples: UMT's features of the generated clips for each of the samples per prompt, each `(N, D)`.
        reference: its features of the real clips `(R, D)`, such as the official gt150_feats.pt (150 x 768).
        sizes: the subset sizes.
        seeds: the seeds of the subsets; each is the state of Python's `random` before one draw.

    Returns:
        The mean distance over samples and seeds by size.

    Raises:
        ValueError: as `frechet`, or there are no samples, sizes or seeds.
    """
    if not (len(samples) and len(sizes) and len(seeds)):
        raise ValueError("samples, sizes, seeds: each needs at least one entry")
    # The official scripts hold features in float32 and add them up in float64.
    real = np.asarray(reference, np.float32)
    generated = [np.asarray(features, np.float32) for features in samples]
    distances = {
        size: [
            frechet(real[_subset(len(real), size, seed)], rows[_subset(len(rows), size, seed)], ddof=0)
            for rows in generated
            for seed in seeds
        ]
        for size in sizes
    }
    return {size: float(np.mean(values)) for size, values in distances.items()}


def official_path(model: str, video_id: str, sample: int | None) -> PurePosixPath:
    """Returns where the official scripts expect a clip, relative to their input folder.

    Args:
        model: the model's name.
        video_id: the prompt's id, such as "3d_printing_08".
        sample: the sample's number from 1 to 3 (`model/1/id.mp4`); None for one sample per prompt (`model/id.mp4`), the
            layout of closed models, and that of the UMT and CHScore scripts for ChronoMagic-Bench-150.

    Raises:
        ValueError: a name is empty, contains a separator, begins with a dot or contains ".mp4", at which the scripts
            end a name; or `sample` is out of range.
    """
    for key, name in (("model", model), ("video_id", video_id)):
        if not name or name.startswith(".") or ".mp4" in name or any(sign in name for sign in "/\\\0"):
            raise ValueError(f"{key} must be a plain file name without the suffix .mp4, got {name!r}")
    if sample is not None and not 1 <= sample <= SAMPLES:
        raise ValueError(f"sample must lie in 1..{SAMPLES}, got {sample}")
    folder = PurePosixPath(model) if sample is None else PurePosixPath(model, str(sample))
    return folder / f"{video_id}.mp4"


def leaderboard_entry(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Returns the content of the official ChronoMagic-Bench-Input.json.

    Args:
        scores: for each model any of "CHScore", "MTScore", "GPT4o-MTScore", "UMT-FVD" and "UMTScore". The official
            merge writes -1 for the last two, to be filled in by hand; so does this if they are missing.

    Raises:
        ValueError: a score has another name.
    """
    averaged = ("CHScore", "GPT4o-MTScore", "MTScore")
    merged = ("UMT-FVD", "UMTScore")
    entries = {}
    for model, values in scores.items():
        if unknown := set(values) - {*averaged, *merged}:
            raise ValueError(f"scores[{model!r}]: unknown {sorted(unknown)}, expected {[*averaged, *merged]}")
        own = {f"Average_{name}": float(values[name]) for name in averaged if name in values}
        entries[model] = own | {name: float(values.get(name, -1)) for name in merged}
    return entries


def _subset(count: int, size: int, seed: int) -> list[int]:
    """Returns the rows that the official scripts draw: Python's `random.sample` right after `random.seed(seed)`."""
    return random.Random(seed).sample(range(count), size) if size < count else list(range(count))
