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
            scores = piece["stops"][-1]["scores"]
            tried[piece["row"]][piece["rate"]] = float(np.mean([np.mean(scores[scale]) for scale in _SCALES]))
    complete = {row: rates for row, rates in tried.items() if row in ROWS and len(rates) == len(ROWS[row].rates)}
    return {row: max(rates, key=rates.__getitem__) for row, rates in complete.items()}


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
                        yield piece["row"], budget, stop | told


def _entry(base: dict[str, Any], budget: str, row: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one row of a table: the mean over its training seeds against the base, prompt by prompt."""
    found = sorted(found, key=lambda stop: stop["seed"])
    method = ROWS.get(row)
    entry: dict[str, Any] = {
        "budget": budget,
        "row": row,
        "title": FROM_ABLATION[row] if method is None else method.title,
        "sees": "winners" if method is None else method.sees,
        "by_judge": method is not None and method.by_judge,
        "rate": found[0]["rate"],
        "seeds": [stop["seed"] for stop in found],
        **{name: round(float(np.mean([stop[name] for stop in found]))) for name in ("update", *BUDGETS)},
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
        {"row": piece["row"], "rate": piece["rate"]}
        | {scale: float(np.mean(piece["stops"][-1]["scores"][scale])) for scale in _SCALES}
        for piece in tried
    ]


def _seconds(pieces: list[dict[str, Any]], row: str) -> float:
    return float(np.mean([piece["seconds"] for piece in pieces if piece["row"] == row]))


def method_tables(result: dict[str, Any]) -> str:
    """Returns the tables as Markdown, one per budget."""
    parts = []
    for budget, title in _TITLES.items():
        entries = [entry for entry in result["entries"] if entry["budget"] == budget]
        if entries:
            parts += [f"{title}:", _table(entries)]
    return "\n\n".join([*parts, _origin(result)]) if parts else "Not measured yet."


def _table(entries: list[dict[str, Any]]) -> str:
    """Returns one table, sorted by the gain at the first guidance scale; rows trained on the judge come last."""
    heads = [f"guidance {scale}: gain [95 %]" for scale in [*_SCALES, "1"]]
    lines = [
        f"| method | sees | lr | seeds | updates | samples | rows | {' | '.join(heads)} |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(entries, key=lambda entry: (entry["by_judge"], -entry["gains"][_SCALES[0]]["difference"]))
    for entry in order:
        mark = "*" if entry["by_judge"] else ""
        cells = [f"{mark}{entry['title']}{mark}", entry["sees"], f"{entry['rate']:g}", str(len(entry["seeds"]))]
        cells += [f"{entry[name]:,}" for name in ("update", "samples", "rows")]
        cells += [_gain(entry["gains"][scale], mark) if scale in entry["gains"] else "" for scale in [*_SCALES, "1"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gain(gain: dict[str, Any], mark: str) -> str:
    seeds = gain["by_seed"]
    spread = f", seeds {min(seeds):+.3f} to {max(seeds):+.3f}" if len(seeds) > 1 else ""
    return f"{mark}{interval(gain)}{spread}{mark}"


def _origin(result: dict[str, Any]) -> str:
    base = ", ".join(f"{score:.3f} at guidance {scale}" for scale, score in result["base"].items())
    took = ", ".join(f"{row} {seconds:.0f}" for row, seconds in result["seconds"].items())
    return (
        f"`{result['command']}`: {result['prompts']} held-out prompts, the same for each training seed. Base {base}. "
        f"Seconds per run on one core, judging included: {took}; commits {', '.join(result['commits'])}."
    )
