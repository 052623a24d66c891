"""Measures media against real pictures or clips, metric by metric, into files.

FOLDER/metrics/<features>-real.safetensors                features of the real pictures or clips
FOLDER/metrics/<features>-<model digest>.safetensors      features of a model's files, in the order of the items
FOLDER/metrics/<metric>-<model digest>.safetensors        a value per file, for metrics that compare pairs
FOLDER/metrics/<metric>.json                              what was measured, or why it failed
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from seppo_fast.evaluation.media.files import decode_media
from seppo_fast.evaluation.media.items import Media, media_digests
from seppo_fast.evaluation.media.work import alone
from seppo_fast.evaluation.metrics import alexnet, similarity
from seppo_fast.evaluation.metrics.features import FeatureFunction, load_features
from seppo_fast.evaluation.real.arrays import MetricError, Pictures, Rows, Stamp, fill, names_digest, read_stamp
from seppo_fast.evaluation.real.metrics import METRICS, Choice
from seppo_fast.evaluation.real.sets import RealSet
from seppo_fast.utils.errors import CheckpointError, OutOfMemoryError
from seppo_fast.utils.files import write_atomically
from seppo_fast.utils.logging import warn
from seppo_fast.utils.memory import is_out_of_memory

FOLDER, REAL = "metrics", "real"
_CHUNK = 64  # frames that are measured at once; a picture is one frame
_LARGE_CHUNK = 8  # pictures that are loaded at once if they have their own size, which may be 64 megapixels
_MOST_PIXELS = 17_000_000  # of pictures that are measured at once, as floats: 64 of 512 x 512, or one of 4000 x 3000

PairFunction = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class MetricInfo:
    """What a metric was measured with.

    Attributes:
        metric: its name.
        features: the features of a distance; empty for a comparison of pairs.
        stem: the beginning of the names of its files.
        digest: a digest of its weights and rules.
        real: the name of the real pictures or clips.
        real_count: their number.
        real_digest: a digest of their contents.
        arrays: for each of its arrays, by the end of the file's name, the digest of the contents that it was computed
            from: another command may have replaced it.
        problem: why it could not be measured; empty if it was.
        real_prompts: the place of each real file's prompt in the prompt file, -1 without one; empty if none has one.
    """

    metric: str
    features: str
    stem: str
    digest: str
    real: str
    real_count: int
    real_digest: str
    arrays: Mapping[str, str]
    problem: str = ""
    real_prompts: Sequence[int] = ()


def measure(
    folder: Path, media: Media, real: RealSet, choice: Choice, device: torch.device, rank: int = 0, world: int = 1
) -> list[str]:
    """Measures all media with the chosen metrics; what exists for the same files and weights is kept.

    A metric that fails has no values; the others are not affected.

    Args:
        folder: the folder with the media and their `items.json`.
        media: the items.
        real: the real pictures or clips.
        choice: the metrics.
        device: the networks' device.
        rank: this process's rank.
        world: the number of processes.

    Returns:
        A message for each metric that failed.

    Raises:
        ConfigError: a media file is missing.
        DataError: a media file or a real one is damaged, or a prompt lacks its real counterpart.
        CheckpointError: the results cannot be written.
        OutOfMemoryError: a network does not fit.
    """
    contents, reals = media_digests(folder, media), real.digests()
    pairs = any(METRICS[name].kind == "pairs" for name in choice.names)
    counterparts, prompts = real.counterparts() if pairs else [], real.prompt_places()
    prompts = prompts if max(prompts) >= 0 else []
    real_digest, problems = hashlib.sha256("".join(reals).encode()).hexdigest(), []
    for name in choice.names:
        features = choice.features_of(name)
        stem = re.sub(r"[^\w.-]+", "_", features or name)
        digest = choice.digest(name)
        models = _model_rows(folder, media, contents, real.wanted.frames or 1)
        if features:
            fitted = not METRICS[name].features or real.wanted.frames is not None
            rows = [_real_rows(real, reals, fitted=fitted), *models]
            compute = partial(_featured, cache(partial(_feature_function, choice, name, device)))
        else:
            own = [counterparts[item.prompt_index] for item in media.items]
            rows = [_with_counterparts(some, real, reals, own) for some in models]
            compute = partial(_compared, cache(partial(_pair_function, choice, name, device)))
        stamps = {some.name: some.stamp(digest) for some in rows}
        contents_of = {some: stamp.contents for some, stamp in stamps.items()}
        info = MetricInfo(name, features, stem, digest, real.name, len(reals), real_digest, contents_of, "", prompts)
        try:
            for some in rows:
                file = folder / FOLDER / f"{stem}-{some.name}.safetensors"
                fill(file, some, digest, f"files of {some.name} for {name}", compute, rank, world)
        except MetricError as problem:
            info = replace(info, problem=str(problem))
        if _write_info(folder / FOLDER, info, stamps).problem:
            warn(f"metric {name}: {info.problem}; it is left out")
            problems.append(f"{name}: {info.problem}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return problems


def _write_info(place: Path, info: MetricInfo, stamps: Mapping[str, Stamp]) -> MetricInfo:
    """Writes what was measured and returns it: without a problem if another process has finished all arrays."""
    with alone(place, {f"{info.metric}.json"}):
        files = {place / f"{info.stem}-{name}.safetensors": stamp for name, stamp in stamps.items()}
        if info.problem and all(read_stamp(file) == stamp for file, stamp in files.items()):
            info = replace(info, problem="")
        content = json.dumps(asdict(info), indent=1, ensure_ascii=False) + "\n"
        write_atomically(place / f"{info.metric}.json", content.encode("utf-8", "backslashreplace"), CheckpointError)
    return info


def _real_rows(real: RealSet, digests: Sequence[str], *, fitted: bool) -> Rows:
    def load(place: int) -> Pictures:
        return (real.load(place, fitted=fitted),)

    # The same files at another size have other features.
    contents = [f"{digest} {_form(real) if fitted else ''}" for digest in digests]
    chunk = max(1, _CHUNK // (real.wanted.frames or 1)) if fitted else _LARGE_CHUNK
    return Rows(REAL, "", contents, load, chunk)


def _model_rows(folder: Path, media: Media, contents: Mapping[str, str], frames: int) -> list[Rows]:
    """Returns the rows of each model; equal models, which share their files, come once."""
    found = {}
    for name, digest in media.models.items():
        files = [item.files[name] for item in media.items]
        load = partial(_generated, folder, files)
        chunk = max(1, _CHUNK // frames)
        found[digest] = Rows(digest, names_digest(files), [contents[file] for file in files], load, chunk)
    return list(found.values())


def _with_counterparts(rows: Rows, real: RealSet, digests: Sequence[str], own: Sequence[int]) -> Rows:
    def load(row: int) -> Pictures:
        return (*rows.load(row), real.load(own[row]))

    contents = [f"{content} {digests[place]} {_form(real)}" for content, place in zip(rows.contents, own)]
    return replace(rows, contents=contents, load=load)


def _form(real: RealSet) -> str:
    return f"{real.wanted.resolution} x {real.wanted.frames or 1}"


def _generated(folder: Path, files: Sequence[str], row: int) -> Pictures:
    return (decode_media((folder / files[row]).read_bytes(), str(folder / files[row])),)


def _feature_function(choice: Choice, name: str, device: torch.device) -> FeatureFunction:
    files = choice.files(name)
    function = load_features(choice.features_of(name), files[0] if files else None, device)
    if not METRICS[name].features or METRICS[name].frames:
        return function

    def of_frames(pictures: np.ndarray) -> np.ndarray:
        """Gives every frame of a clip its own features."""
        measured = function(pictures.reshape(-1, *pictures.shape[-3:]))
        return measured.reshape(len(pictures), -1, measured.shape[-1])

    return of_frames


def _featured(load: Callable[[], FeatureFunction], pictures: list[Pictures]) -> np.ndarray:
    """Returns features `(N, R, D)` float32: R rows per picture or clip; raises MetricError."""
    rows, start = [], 0
    while start < len(pictures):  # real pictures may differ in size; neighbours of one size are measured together
        end = start
        shape = pictures[start][0].shape
        most = _CHUNK if len(shape) > 3 else max(1, _MOST_PIXELS // (shape[0] * shape[1]))
        while end < min(len(pictures), start + most) and pictures[end][0].shape == shape:
            end += 1
        stacked = np.stack([one for (one,) in pictures[start:end]])
        values = _called(load, stacked)
        rows.append(values.astype(np.float32).reshape(end - start, -1, values.shape[-1]))
        start = end
    if len({row.shape[1:] for row in rows}) > 1:
        raise MetricError("its features have different sizes for pictures of different sizes")
    return np.concatenate(rows)


def _pair_function(choice: Choice, name: str, device: torch.device) -> PairFunction:
    if name == "lpips":
        network, heads = choice.files(name)
        return partial(alexnet.lpips, alexnet.load_lpips(network, heads, device))
    return {"ssim": similarity.ssim, "psnr": similarity.psnr}[name]


def _compared(load: Callable[[], PairFunction], pairs: list[Pictures]) -> np.ndarray:
    """Returns the values of pairs `(N,)` float64; raises MetricError."""
    first, second = (np.stack(side) for side in zip(*pairs))
    return _called(load, first, second)


def _called(load: Callable[[], Callable[..., np.ndarray]], *pictures: np.ndarray) -> np.ndarray:
    """Returns the values of a network or of a user's own function; raises MetricError if it fails or they are NaN."""
    try:
        values = np.asarray(load()(*pictures))
    except Exception as problem:
        if is_out_of_memory(problem):
            raise OutOfMemoryError(
                "out of memory while measuring; free memory on the device, or set ACCELERATE_USE_CPU=true to measure "
                "on the CPU, and rerun the same command to resume"
            ) from problem
        text = str(problem).strip().split("\n")[0]
        raise MetricError(f"failed ({type(problem).__name__}{f': {text}' if text else ''})") from problem
    if not np.isfinite(values).all():
        raise MetricError(
            f"returned non-finite values for {int((~np.isfinite(values)).sum())} of {values.size} numbers"
        )
    return values
