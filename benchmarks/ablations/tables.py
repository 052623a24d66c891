"""Evaluates the finished runs of the ablation: each row against the base and against SePPO, with intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.ablations.rows import ALL_ROWS, GUIDANCE, REGIMES, ROWS, SEPPO, UPDATES
from seppo_fast.evaluation.statistics import paired_difference

Finished = Mapping[str, dict[str, Any]]
_SCALES = [f"{scale:g}" for scale in GUIDANCE]


def best_rates(finished: Finished, rows: Iterable[str] = ROWS) -> dict[str, float] | None:
    """Returns each row's learning rate with the higher mean score on development prompts, over both guidance scales.

    Returns:
        Row to learning rate, or None if any of the rows has not been tried at both rates.
    """
    tried: dict[str, dict[float, float]] = defaultdict(dict)
    for piece in finished.values():
        if piece.get("study") == "rates" and piece["row"] in ROWS:
            scores = piece["stops"][-1]["scores"]
            tried[piece["row"]][piece["rate"]] = float(np.mean([np.mean(scores[scale]) for scale in _SCALES]))
    if any(len(tried[row]) < 2 for row in rows):
        return None
    return {row: max(tried[row], key=tried[row].__getitem__) for row in rows}


def tables(finished: Finished) -> dict[str, Any]:
    """Returns all tables, computed from the runs that are finished.

    `rows` has one entry per row and stop of the study `table`, `regimes` one per regime and row; each entry lists the
    training seeds that it averages over. The items of an interval are prompts, each scored by its mean over seeds.
    """
    base = finished["base"]
    table = _groups(finished, "table")
    regimes = _groups(finished, "regimes")
    return {
        "command": "python -m benchmarks.ablation",
        "commits": sorted({piece["commit"] for piece in finished.values()}),
        "base": {scale: float(np.mean(base["scores"][scale])) for scale in _SCALES},
        "prompts": len(base["scores"][_SCALES[0]]),
        "rates": _rates(finished),
        "rows": [_entry(base, key, found, table) for key, found in table.items()],
        "regimes": [_entry(base, key, found, regimes) for key, found in regimes.items() if key[2]],
    }


Key = tuple[str, str, int]  # regime, row, update


def _groups(finished: Finished, study: str) -> dict[Key, list[dict[str, Any]]]:
    """Returns the stops of all seeds by regime, row and update, in the order of the tables."""
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for piece in finished.values():
        if piece.get("study") == study and piece["row"] in ALL_ROWS:
            for stop in piece["stops"]:
                key = piece["regime"], piece["row"], stop["update"]
                groups[key].append(stop | {"seed": piece["seed"], "rate": piece["rate"]})
    order = list(ALL_ROWS), ["", *REGIMES]
    keys = sorted(groups, key=lambda key: (order[1].index(key[0]), order[0].index(key[1]), key[2]))
    return {key: sorted(groups[key], key=lambda stop: stop["seed"]) for key in keys}


def _entry(
    base: dict[str, Any], key: Key, found: list[dict[str, Any]], groups: Mapping[Key, list[dict[str, Any]]]
) -> dict[str, Any]:
    regime, row, update = key
    entry = {
        "regime": regime,
        "row": row,
        "title": ALL_ROWS[row].title,
        "update": update,
        "rate": found[0]["rate"],
        "seeds": [stop["seed"] for stop in found],
        **{name: found[0][name] for name in ("pairs", "samples", "row_forwards")},
        **{name: float(np.mean([stop[name] for stop in found])) for name in ("seconds", "winner_error")},
    }
    seppo = groups.get((regime, SEPPO, UPDATES), [])
    common = {stop["seed"] for stop in found} & {stop["seed"] for stop in seppo}
    begun = {stop["seed"]: stop for stop in groups.get((regime, row, 0), [])}
    for scale in _SCALES:
        # The gain is over the starting point: a run after SFT starts from its own stop 0, all others from the base.
        against = [begun.get(stop["seed"], base)["scores"][scale] for stop in found]
        compared: dict[str, Any] = asdict(paired_difference(np.mean(against, axis=0), _mean(found, scale)))
        seeds = [paired_difference(own, stop["scores"][scale]) for own, stop in zip(against, found, strict=True)]
        compared["seed_lows"] = [one.low for one in seeds]
        compared["seed_differences"] = [one.difference for one in seeds]
        if common and row != SEPPO:
            pair = (_mean([stop for stop in side if stop["seed"] in common], scale) for side in (seppo, found))
            compared["against_seppo"] = asdict(paired_difference(*pair))
        entry[f"guidance {scale}"] = compared
    return entry


def _mean(found: list[dict[str, Any]], scale: str) -> np.ndarray:
    """Returns each prompt's mean score over seeds; seeds share prompts and starting noise, so they are not items."""
    return np.mean([stop["scores"][scale] for stop in found], axis=0)


def _rates(finished: Finished) -> list[dict[str, Any]]:
    tried = [piece for piece in finished.values() if piece.get("study") == "rates" and piece["row"] in ROWS]
    tried.sort(key=lambda piece: (list(ROWS).index(piece["row"]), piece["rate"]))
    return [
        {"row": piece["row"], "rate": piece["rate"], "winner_error": piece["stops"][-1]["winner_error"]}
        | {scale: float(np.mean(piece["stops"][-1]["scores"][scale])) for scale in _SCALES}
        for piece in tried
    ]
