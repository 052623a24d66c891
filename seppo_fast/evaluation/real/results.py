"""The metrics of measured media, computed from files alone: the section `metrics` of scores.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seppo_fast.evaluation.media.items import BASE, Media
from seppo_fast.evaluation.metrics.frechet import Units, compare, frechet_difference, resamples_for
from seppo_fast.evaluation.metrics.kernel import (
    LARGEST,
    SUBSET,
    Groups,
    discrepancy,
    kernel_difference,
    kernel_distance,
    kernel_interval,
)
from seppo_fast.evaluation.real.arrays import names_digest, read_array
from seppo_fast.evaluation.real.measuring import FOLDER, REAL, MetricInfo
from seppo_fast.evaluation.real.metrics import METRICS, VERSION
from seppo_fast.evaluation.scoring.score_files import ScorerInfo
from seppo_fast.evaluation.scoring.table import Scored, comparisons
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json
from seppo_fast.utils.logging import say
from seppo_fast.utils.progress import progress

DRAWS = 100  # resamples of a distance, unless it is too expensive
_RERUN = "rerun the command without --only statistics"


@dataclass(frozen=True)
class Measured:
    """The media of a folder with what was measured against real ones.

    Attributes:
        scored: the media.
        infos: the metrics that have values for all media, by name.
        real: the features of the real pictures or clips `(N, R, D)`, by the metric's name, for distances.
        models: for each metric and model, features `(N, R, D)` float32 or values `(N,)` float64 of the N items.
        without: why metrics have no values, by name.
    """

    scored: Scored
    infos: Mapping[str, MetricInfo]
    real: Mapping[str, np.ndarray]
    models: Mapping[str, Mapping[str, np.ndarray]]
    without: Mapping[str, str]

    @property
    def columns(self) -> dict[str, Mapping[str, np.ndarray]]:
        """The values of each item by metric and model, for metrics that compare pairs."""
        return {name: self.models[name] for name in self.infos if METRICS[name].kind == "pairs"}


def read_measured(scored: Scored, names: Sequence[str] | None) -> Measured | None:
    """Reads what `measure` wrote.

    Args:
        scored: the media and their scores.
        names: the metrics to include, in this order; None: all that were measured.

    Returns:
        The measured metrics; None if no metric was requested or measured.

    Raises:
        ConfigError: a file is malformed.
    """
    folder, media = scored.folder / FOLDER, scored.media
    known = [name for name in METRICS if (folder / f"{name}.json").is_file()] if names is None else list(names)
    infos: dict[str, MetricInfo] = {}
    without: dict[str, str] = {}
    real: dict[str, np.ndarray] = {}
    models: dict[str, dict[str, np.ndarray]] = {}
    for name in known:
        info = _read_info(folder / f"{name}.json")
        if info is None or info.problem:
            without[name] = info.problem if info else "it was not measured; add --metrics and --real"
            continue
        arrays = {digest: _array(folder, info, digest, media) for digest in set(media.models.values())}
        reals = None if METRICS[name].kind == "pairs" else _array(folder, info, REAL, media)
        if any(array is None for array in arrays.values()) or (METRICS[name].kind != "pairs" and reals is None):
            without[name] = f"it has not measured all media, or other real files since; {_RERUN}"
            continue
        infos[name] = info
        models[name] = {model: array for model, digest in media.models.items() if (array := arrays[digest]) is not None}
        if reals is not None:
            real[name] = reals
    return Measured(scored, infos, real, models, without) if known else None


def _read_info(file: Path) -> MetricInfo | None:
    try:
        return MetricInfo(**read_json(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as problem:
        raise ConfigError(f"{file}: malformed ({problem}); remove it and measure again") from problem


def _array(folder: Path, info: MetricInfo, name: str, media: Media) -> np.ndarray | None:
    """Returns an array of a metric; None if it is missing or was computed from other files or weights."""
    found = read_array(folder / f"{info.stem}-{name}.safetensors")
    if found is None or (found[0].digest, found[0].contents) != (info.digest, info.arrays.get(name)):
        return None
    if name != REAL:
        model = next(model for model, digest in media.models.items() if digest == name)
        if found[0].names != names_digest([item.files[model] for item in media.items]):
            return None
    return found[1]


def metrics_section(measured: Measured) -> dict[str, Any]:
    """Returns the section `metrics` of `scores.json`: for each metric its values, differences and what to know."""
    compared = comparisons(_as_scored(measured))
    found: dict[str, Any] = {}
    without = dict(measured.without)
    for name, info in measured.infos.items():
        metric = METRICS[name]
        about: dict[str, Any] = {
            "label": metric.label,
            "kind": metric.kind,
            "real": {"name": info.real, "count": info.real_count, "digest": info.real_digest},
            "unverified": bool(metric.sources),
        }
        if metric.kind == "pairs":
            found[name] = about | compared[name]
            continue
        about |= {"features": info.features, "digest": info.digest}
        try:
            found[name] = about | _distances(measured, name)
        except ValueError as problem:  # too few samples
            without[name] = str(problem)
    return {"values": found, "missing": without}


def _as_scored(measured: Measured) -> Scored:
    """Returns the metrics of pairs in the form of scores, so that the same statistics apply."""
    infos = {
        name: ScorerInfo(name, name, VERSION, measured.infos[name].digest, "float64", METRICS[name].higher_is_better, 0)
        for name in measured.columns
    }
    scored = measured.scored
    return Scored(scored.folder, scored.settings, scored.media, infos, measured.columns, {})


def _distances(measured: Measured, name: str) -> dict[str, Any]:
    """Returns the numbers of a Fréchet or kernel distance; raises ValueError for too few samples."""
    media, real = measured.scored.media, measured.real[name]
    # The samples of a prompt become neighbours, because they are drawn together.
    order = sorted(range(len(media.items)), key=lambda row: (media.items[row].prompt_index, media.items[row].sample))
    models = {model: array[order] for model, array in measured.models[name].items()}
    samples = len({item.sample for item in media.items})
    frames, dimensions = models[BASE].shape[1:]
    if real.shape[1:] != (frames, dimensions):
        raise ValueError(f"real and generated files have features of sizes {real.shape[1:]} and {(frames, dimensions)}")
    units = (frames, frames * samples)
    reals = real.reshape(-1, dimensions)
    rows = {model: array.reshape(-1, dimensions) for model, array in models.items()}
    about = {"dimensions": dimensions, "frames": frames, "n_real": len(reals), "n_generated": len(rows[BASE])}
    if METRICS[name].kind == "frechet":
        return about | _frechet(name, reals, rows, units, frames)
    return about | _kernel(name, reals, rows, units, _groups(measured, name, order, frames))


def _groups(measured: Measured, name: str, order: Sequence[int], frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers of all real and generated rows: equal for frames of a clip and for files of equal prompts."""
    items, info = measured.scored.media.items, measured.infos[name]
    texts = {item.prompt_index: item.prompt for item in items}
    known = {text: number for number, text in enumerate(dict.fromkeys(texts.values()))}
    prompts = {place: known[text] for place, text in texts.items()}
    reals = [
        prompts.get(own, len(known) + place)
        for place, own in enumerate(info.real_prompts or [-1] * len(measured.real[name]))
    ]
    generated = [prompts[items[row].prompt_index] for row in order]
    return np.repeat(reals, frames), np.repeat(generated, frames)


def _frechet(
    name: str, real: np.ndarray, models: Mapping[str, np.ndarray], units: Units, frames: int
) -> dict[str, Any]:
    resamples = resamples_for(len(real), len(models[BASE]), real.shape[1])
    if resamples < DRAWS:
        say(
            f"{name}: {len(real)} real and {len(models[BASE])} generated samples of {real.shape[1]} features; "
            f"intervals from {resamples} instead of {DRAWS} resamples, which may take minutes"
        )
    values: dict[str, Any] = {}
    floor: dict[str, Any] = {}
    with warnings.catch_warnings(), progress(2 * len(models) - 1, "computed", f"parts of {name}") as advance:
        warnings.simplefilter("ignore", RuntimeWarning)  # of a floor at fewer samples; `floor_items` tells
        for model, rows in models.items():
            found = compare(real, rows, resamples=resamples, units=units, frames=frames)
            low, high = _ends(found.low, found.high)
            values[model] = {"value": found.value, "low": low, "high": high, "warning": found.warning}
            floor = {"floor": found.floor, "floor_items": found.floor_items, "floor_others": found.floor_others}
            advance(1)
        runs = {}
        for run in [model for model in models if model != BASE]:
            runs[run] = _difference(
                frechet_difference(real, models[BASE], models[run], resamples=resamples, units=units)
            )
            advance(1)
    return {"resamples": resamples, **floor, "models": values, "runs": runs}


def _kernel(
    name: str, real: np.ndarray, models: Mapping[str, np.ndarray], units: Units, groups: Groups
) -> dict[str, Any]:
    """Returns the numbers of a kernel distance; its expectation for equal distributions is 0, so it has no floor."""
    wide = max(len(real), len(models[BASE])) > LARGEST
    subset = min(SUBSET, len(real), len(models[BASE])) if wide else None
    values: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    with progress(len(models), "computed", f"models for {name}") as advance:
        for model, rows in models.items():
            if wide:
                value, deviation = kernel_distance(real, rows, subset_size=subset, groups=groups)
                values[model] = {"value": value, "low": None, "high": None, "deviation": deviation}
            else:
                value = discrepancy(real, rows, groups=groups)
                low, high = _ends(*kernel_interval(real, rows, units=units, groups=groups))
                values[model] = {"value": value, "low": low, "high": high, "deviation": None}
            if model != BASE:
                change = values[model]["value"] - values[BASE]["value"], math.nan, math.nan
                if not wide:
                    change = kernel_difference(real, models[BASE], rows, units=units, groups=groups)
                runs[model] = _difference(change)
            advance(1)
    return {"resamples": None if wide else DRAWS, "subset": subset, "models": values, "runs": runs}


def _difference(found: tuple[float, float, float]) -> dict[str, float | None]:
    value, *ends = found
    return dict(zip(("difference", "low", "high"), (value, *_ends(*ends)), strict=True))


def _ends(low: float, high: float) -> tuple[float | None, float | None]:
    """Returns the ends of an interval; None without one."""
    return (None, None) if math.isnan(low) else (low, high)
