"""The results of scored media, computed from files alone: scores.json, scores.csv, scores.md, grid.png.

A section of `scores.json` is computed by one function of the scored media, see `_sections`.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seppo_fast.evaluation.grids import side_by_side
from seppo_fast.evaluation.media.files import decode_media
from seppo_fast.evaluation.media.items import BASE, Item, Media, read_media
from seppo_fast.evaluation.media.work import alone
from seppo_fast.evaluation.scores import SCHEMA, SCORES
from seppo_fast.evaluation.scoring.markdown import PUBLISHED, markdown
from seppo_fast.evaluation.scoring.score_files import ScorerInfo, read_scores_of
from seppo_fast.evaluation.statistics import (
    bootstrap,
    cluster,
    given,
    holm,
    paired_difference,
    sign_flip,
    spearman,
    win_rate,
)
from seppo_fast.scorers import registry
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.fault_injection import fault
from seppo_fast.utils.files import write_atomically
from seppo_fast.utils.random import keyed_rng

TABLE, CSV, GRID = "scores.md", "scores.csv", "grid.png"
EXTREMES = 10  # largest gains and largest losses in scores.json
_GRID_EXTREMES, _GRID_RANDOM = 3, 4  # rows of the picture


@dataclass(frozen=True)
class Scored:
    """The media of a folder with their scores.

    Attributes:
        folder: the folder.
        settings: how the media were made: the content of `settings.json`.
        media: the items.
        infos: the scorers, by key.
        scores: for each key and model, the scores `(N,)` float64 of the N items; NaN where a scorer gave none.
        without: why scorers have no scores, by name or key.
    """

    folder: Path
    settings: Mapping[str, Any]
    media: Media
    infos: Mapping[str, ScorerInfo]
    scores: Mapping[str, Mapping[str, np.ndarray]]
    without: Mapping[str, str]

    @property
    def runs(self) -> list[str]:
        """The names of the models other than the base."""
        return [name for name in self.media.models if name != BASE]

    @property
    def prompts(self) -> list[str]:
        """The prompt of each item."""
        return [item.prompt for item in self.media.items]


def read_scored(folder: Path, settings: Mapping[str, Any], names: Sequence[str] | None = None) -> Scored:
    """Reads the media and the scores in a folder.

    Args:
        folder: the folder.
        settings: the content of its `settings.json`.
        names: the scorers to include, in this order; None: all that have scores for all media.

    Raises:
        ConfigError: `items.json` is missing, or no scorer has scores for all media.
        DataError: a file is malformed.
    """
    media = read_media(folder)
    found, without = read_scores_of(folder, media)
    if names is not None:
        found = {key: those for name in names for key, those in found.items() if those[0].scorer == name}
        have = {info.scorer for info, _ in found.values()}
        absent = {name: "it was not run" for name in names if name not in have}
        without = absent | {name: why for name, why in without.items() if name not in have}
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in without.items()) or "there are no scores"
        raise ConfigError(f"{folder}: no scorer has scores for all media ({reasons}); run the command without --only")
    scores = {
        key: {name: np.array([of[item.files[name]] for item in media.items]) for name in media.models}
        for key, (_, of) in found.items()
    }
    return Scored(folder, settings, media, {key: info for key, (info, _) in found.items()}, scores, without)


def write_results(
    scored: Scored,
    weights: Path | None = None,
    more: Mapping[str, Any] | None = None,
    columns: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    text: str = "",
) -> dict[str, Any]:
    """Computes the statistics and writes the four files; returns the content of `scores.json`.

    Args:
        scored: the scored media.
        weights: the folder of the scorers' weights, to say which published scorers lack theirs.
        more: further sections of `scores.json`.
        columns: further columns of `scores.csv`: for each name and model, values `(N,)` of the N items.
        text: further text of `scores.md`.

    Raises:
        CheckpointError: a file cannot be written.
        DataError: a media file that the picture shows is damaged.
    """
    folder = scored.folder
    tree = {"schema": SCHEMA, **scored.settings, **_sections(scored), **(more or {})}
    tree["missing"] = _missing(scored, weights)
    with alone(folder, {SCORES, CSV, TABLE, GRID}):
        content = json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(folder / SCORES, content.encode(), CheckpointError)
        fault("statistics-write")
        write_atomically(folder / CSV, _csv(scored, columns or {}).encode(), CheckpointError)
        write_atomically(folder / TABLE, (markdown(scored.media, tree) + text).encode(), CheckpointError)
        write_atomically(folder / GRID, _grid(scored), CheckpointError)
    return tree


def _sections(scored: Scored) -> dict[str, Any]:
    """Returns the computed sections of `scores.json`."""
    return {"scorers": comparisons(scored), "spearman": _agreement(scored)}


def comparisons(scored: Scored) -> dict[str, Any]:
    """Returns each scorer's means, and its comparison of each run with the base, over prompts, by the scorer's key."""
    rows: dict[str, Any] = {}
    for key, info in scored.infos.items():
        means = {name: _number(_mean(scores)) for name, scores in scored.scores[key].items()}
        rows[key] = asdict(info) | {
            "n": len(scored.media.items),
            "means": means,
            "runs": {run: _comparison(scored, key, run) for run in scored.runs},
        }
    for run in scored.runs:
        keys = [key for key in rows if rows[key]["runs"][run]["p"] is not None]
        for key, p in zip(keys, holm([rows[key]["runs"][run]["p"] for key in keys]), strict=True):
            rows[key]["runs"][run]["p_holm"] = p
    return rows


def differences(scored: Scored, key: str, run: str) -> np.ndarray:
    """Returns the score minus the base's, for each distinct prompt in sorted order: `(P,)`, NaN where one is missing.

    The samples and the duplicates of a prompt are averaged first.
    """
    scores = scored.scores[key]
    return cluster(scored.prompts, scores[run]) - cluster(scored.prompts, scores[BASE])


def _comparison(scored: Scored, key: str, run: str) -> dict[str, Any]:
    base, other = (cluster(scored.prompts, scored.scores[key][name]) for name in (BASE, run))
    change = given(other - base)
    sign = 1 if scored.infos[key].higher_is_better else -1
    numbers: dict[str, Any] = dict.fromkeys(
        ("base", "other", "difference", "low", "high", "bootstrap_low", "bootstrap_high", "p", "p_holm")
        + ("wins", "ties", "losses", "win_rate", "win_low", "win_high")
    )
    numbers |= {"items": len(change), "left_out": len(base) - len(change)}
    if len(change) == 1:  # without an interval
        both = np.isfinite(base) & np.isfinite(other)
        numbers |= {"base": base[both][0], "other": other[both][0], "difference": change[0]}
    elif len(change):
        numbers |= asdict(paired_difference(base, other))
        numbers["bootstrap_low"], numbers["bootstrap_high"] = bootstrap(change)
    if len(change):
        rate = win_rate(sign * change)
        numbers |= {"wins": rate.wins, "ties": rate.ties, "losses": rate.losses, "win_rate": rate.rate}
        numbers |= {"win_low": rate.low, "win_high": rate.high, "p": sign_flip(change)}
    gains, losses = extremes(sign * differences(scored, key, run))
    prompts, values = sorted(set(scored.prompts)), differences(scored, key, run)
    numbers = {name: _number(value) for name, value in numbers.items()}
    for name, places in {"gains": gains, "losses": losses}.items():
        numbers[f"largest_{name}"] = [{"prompt": prompts[p], "difference": float(values[p])} for p in places[:EXTREMES]]
    return numbers


def extremes(change: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns the places of all gains, largest first, and of all losses, largest first; equal ones in order."""
    order = [int(place) for place in np.argsort(-change, kind="stable") if np.isfinite(change[place])]
    gains = [place for place in order if change[place] > 0]
    falling = [int(place) for place in np.argsort(change, kind="stable")]
    return gains, [place for place in falling if change[place] < 0]


def _agreement(scored: Scored) -> dict[str, Any]:
    """Returns Spearman's correlation of each two scorers' differences per prompt, for each run."""
    return {
        run: {
            f"{a} | {b}": _number(spearman(differences(scored, a, run), differences(scored, b, run)))
            for a, b in itertools.combinations(scored.infos, 2)
        }
        for run in scored.runs
    }


def _missing(scored: Scored, weights: Path | None) -> dict[str, str]:
    """Returns why columns of the table are empty, by the scorer's name."""
    have = {info.scorer for info in scored.infos.values()}
    why = dict(scored.without)
    for name in PUBLISHED:
        if name not in have and name not in why:
            absent = registry.missing_weights(name, weights) if name in registry.SCORERS else None
            why[name] = "not requested" + (f"; {absent}" if absent else "")
    return why


def _mean(scores: np.ndarray) -> float:
    found = given(scores)
    return float(found.mean()) if len(found) else math.nan


def _number(value: Any) -> Any:
    """Returns a number as JSON holds it: None if it is non-finite."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _csv(scored: Scored, columns: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Returns a row per item and model, with every score and every value of `columns`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "prompt", "sample", "model", *scored.infos, *columns])
    for place, item in enumerate(scored.media.items):
        for name in scored.media.models:
            found = [of[name][place] for of in (*scored.scores.values(), *columns.values())]
            values = [repr(float(score)) if math.isfinite(score) else "" for score in found]
            writer.writerow([item.id, item.prompt, item.sample, name, *values])
    return text.getvalue()


def _grid(scored: Scored) -> bytes:
    """Returns a PNG: prompts with the largest gains and losses of the first run under the first scorer, and others."""
    key, run = next(iter(scored.infos)), scored.runs[0]
    prompts, change = sorted(set(scored.prompts)), differences(scored, key, run)
    sign = 1 if scored.infos[key].higher_is_better else -1
    gains, losses = (places[:_GRID_EXTREMES] for places in extremes(sign * change))
    order = keyed_rng(0, "score picture", len(prompts)).permutation(len(prompts))
    drawn = [int(place) for place in order if place not in {*gains, *losses}][:_GRID_RANDOM]
    shown = [(f"{key} {change[place]:+.3g}", place) for place in gains + losses]
    shown += [("at random", place) for place in drawn]
    first: dict[str, Item] = {}
    for item in scored.media.items:
        first.setdefault(item.prompt, item)
    rows = [first[prompts[place]] for _, place in shown]
    columns = {
        name: np.stack([decode_media((scored.folder / row.files[name]).read_bytes(), row.files[name]) for row in rows])
        for name in scored.media.models
    }
    labels = [f"{label}: {prompts[place]}" for label, place in shown]
    content = io.BytesIO()
    side_by_side(labels, columns).save(content, "PNG")
    return content.getvalue()
