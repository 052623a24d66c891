"""Evaluates the finished runs of the comparison, and formats its tables as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.ablations.markdown import interval
from benchmarks.ablations.rows import EQUAL_COMPUTE, GUIDANCE, UPDATES
from benchmarks.comparison.rows import BUDGETS, FROM_ABLATION, ROWS
from seppo_fast.evaluation.statistics import paired_difference

Results = Mapping[str, dict[str, Any]]
_SCALES = [f"{scale:g}" for scale in GUIDANCE]
_SHOWN = [*_SCALES, "1"]
_COUNTS = ("pairs", "samples", "scored", "rows")
_TITLES = {
    "pairs": f"Equal training: {BUDGETS['pairs']:,} pairs, samples or steps of the sampler in the loss",
    "samples": f"Equal samples: {BUDGETS['samples']:,} generated",
    "rows": f"Equal compute: {BUDGETS['rows']:,} rows through the network, a backward counted as two",
}
# Which of its stops a row of the ablation has at a budget; SFT generates no samples.
_ABLATION_STOPS = {
    "sft": {"pairs": UPDATES, "rows": EQUAL_COMPUTE},
    "seppo": {"pairs": UPDATES, "samples": UPDATES, "rows": UPDATES},
    "spin": {"pairs": UPDATES, "samples": UPDATES, "rows": UPDATES},
}


def best_rates(finished: Results) -> dict[str, float]:
    """Returns the learning rate of each row whose rates have all been tried: the best on development prompts."""
    tried: dict[str, dict[float, float]] = defaultdict(dict)
    for piece in finished.values():
        if piece.get("study") == "rates":
            tried[piece["row"]][piece["rate"]] = float(np.mean(_means(piece)))
    complete = {row: rates for row, rates in tried.items() if row in ROWS and len(rates) == len(ROWS[row].rates)}
    return {row: max(rates, key=rates.__getitem__) for row, rates in complete.items()}


def _means(piece: dict[str, Any]) -> list[float]:
    """Returns the mean score at each guidance scale at a run's end; 0 if the run diverged before it was read."""
    if not piece["stops"]:
        return [0.0] * len(_SCALES)
    return [float(np.mean(piece["stops"][-1]["scores"][scale])) for scale in _SCALES]


def tables(finished: Results, ablation: Results) -> dict[str, Any]:
    """Returns all tables, computed from the runs that are finished.

    Args:
        finished: the comparison's runs by name, with the base.
        ablation: the ablation's, from which the rows of `FROM_ABLATION` are read. They have the same prompts.
    """
    base = finished["base"]
    stops: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row, budget, stop in [*_own(finished), *_ablation(ablation)]:
        stops[budget, row].append(stop)
    pieces = [piece for piece in finished.values() if piece.get("study") == "table"]
    return {
        "command": "python -m benchmarks.methods",
        "commits": sorted({piece["commit"] for piece in finished.values()}),
        "torch": sorted({piece["torch"] for piece in finished.values() if "torch" in piece}),
        "base": {scale: float(np.mean(scores)) for scale, scores in base["scores"].items()},
        "prompts": len(base["scores"][_SCALES[0]]),
        "rates": _rates(finished),
        "seconds": {row: _seconds(pieces, row) for row in ROWS if any(piece["row"] == row for piece in pieces)},
        "entries": [_entry(base, budget, row, found) for (budget, row), found in stops.items()],
    }


def _own(finished: Results) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for piece in finished.values():
        if piece.get("study") == "table" and piece["row"] in ROWS:
            for stop in piece["stops"]:
                for budget in stop["reached"]:
                    yield piece["row"], budget, stop | {"seed": piece["seed"], "rate": piece["rate"]}


def _ablation(finished: Results) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for piece in finished.values():
        if piece.get("study") == "table" and piece["row"] in FROM_ABLATION and not piece["regime"]:
            for budget, update in _ABLATION_STOPS[piece["row"]].items():
                for stop in piece["stops"]:
                    if stop["update"] == update:
                        told = {"seed": piece["seed"], "rate": piece["rate"], "rows": stop["row_forwards"]}
                        told |= {"decoded": 0, "scored": 0}  # none of these methods decodes anything
                        yield piece["row"], budget, stop | told


def _entry(base: dict[str, Any], budget: str, row: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one row of a table: the mean over its training seeds against the base, prompt by prompt."""
    found = sorted(found, key=lambda stop: stop["seed"])
    title, sees, by_judge = _told(row)
    entry: dict[str, Any] = {
        "budget": budget,
        "row": row,
        "title": title,
        "sees": sees,
        "by_judge": by_judge,
        "rate": found[0]["rate"],
        "seeds": [stop["seed"] for stop in found],
        **{name: round(float(np.mean([stop[name] for stop in found]))) for name in ("update", "decoded", *_COUNTS)},
        "training_seconds": float(np.mean([stop["seconds"] for stop in found])),
        "gains": {},
    }
    for scale in found[0]["scores"]:
        scores = [stop["scores"][scale] for stop in found]
        gain: dict[str, Any] = asdict(paired_difference(base["scores"][scale], np.mean(scores, axis=0)))
        gain["by_seed"] = [float(np.mean(one) - np.mean(base["scores"][scale])) for one in scores]
        entry["gains"][scale] = gain
    return entry


def _rates(finished: Results) -> list[dict[str, Any]]:
    tried = [piece for piece in finished.values() if piece.get("study") == "rates"]
    return [
        {"row": piece["row"], "rate": piece["rate"]} | dict(zip(_SCALES, _means(piece), strict=True)) for piece in tried
    ]


def _seconds(pieces: list[dict[str, Any]], row: str) -> float:
    return float(np.mean([piece["seconds"] for piece in pieces if piece["row"] == row]))


def method_tables(result: dict[str, Any]) -> str:
    """Returns the tables as Markdown, one per budget."""
    if not result["entries"]:
        return "Not measured yet."
    parts = []
    for budget, title in _TITLES.items():
        parts += [f"{title}:", _table(budget, result["entries"])]
    return "\n\n".join([*parts, _origin(result)])


def _table(budget: str, every: list[dict[str, Any]]) -> str:
    """Returns the table of a budget: measured rows, those trained on the judge last, then the others with the reason.

    The measured ones are sorted by the gain at the first guidance scale.
    """
    heads = [f"guidance {scale}: gain [95 %]" for scale in _SHOWN]
    lines = [
        f"| method | sees | lr | seeds | updates | pairs | samples | scored | rows | seconds | {' | '.join(heads)} |",
        f"|{'---|' * (10 + len(heads))}",
    ]
    entries = [entry for entry in every if entry["budget"] == budget]
    order = sorted(entries, key=lambda entry: (entry["by_judge"], -entry["gains"][_SCALES[0]]["difference"]))
    for entry in order:
        mark = "*" if entry["by_judge"] else ""
        cells = [f"{mark}{entry['title']}{mark}", entry["sees"], f"{entry['rate']:g}", str(len(entry["seeds"]))]
        cells += [f"{entry[name]:,}" for name in ("update", *_COUNTS)] + [f"{entry['training_seconds']:.0f}"]
        cells += [_gain(entry["gains"][scale], mark) if scale in entry["gains"] else "" for scale in _SHOWN]
        lines.append(f"| {' | '.join(cells)} |")
    for row in (*FROM_ABLATION, *ROWS):
        if all(entry["row"] != row for entry in entries):
            title, sees, by_judge = _told(row)
            mark = "*" if by_judge else ""
            cells = [
                f"{mark}{title}{mark}",
                sees,
                *[""] * 8,
                _why_absent(row, budget, every),
                *[""] * (len(_SHOWN) - 1),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _told(row: str) -> tuple[str, str, bool]:
    """Returns a row's title, what it sees, and whether it learns from the judge."""
    if row in FROM_ABLATION:
        return FROM_ABLATION[row], "winners", False
    return ROWS[row].title, ROWS[row].sees, ROWS[row].by_judge


def _why_absent(row: str, budget: str, every: list[dict[str, Any]]) -> str:
    """Returns why a row has no entry for a budget."""
    own = [entry for entry in every if entry["row"] == row]
    if not own:
        return "not measured yet"
    if budget == "pairs" and row in ROWS and ROWS[row].second_stage:
        return "used up by the first stage"
    return "not reached" if budget != "samples" or any(entry["samples"] for entry in own) else "generates no samples"


def _gain(gain: dict[str, Any], mark: str) -> str:
    seeds = gain["by_seed"]
    spread = f", seeds {min(seeds):+.3f} to {max(seeds):+.3f}" if len(seeds) > 1 else ""
    return f"{mark}{interval(gain)}{spread}{mark}"


def _origin(result: dict[str, Any]) -> str:
    base = ", ".join(f"{score:.3f} at guidance {scale}" for scale, score in result["base"].items())
    took = ", ".join(f"{row} {seconds:.0f}" for row, seconds in result["seconds"].items())
    return (
        f"`{result['command']}`: {result['prompts']} held-out prompts, the same for each training seed. Base {base}. "
        f"Seconds per run on one core, judging included: {took}; torch {', '.join(result['torch'])}, "
        f"commits {', '.join(result['commits'])}."
    )
