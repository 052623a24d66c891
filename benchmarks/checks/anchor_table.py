"""Formats the result of `python -m benchmarks.anchor` as Markdown tables that are also readable in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def anchor_table(result: dict[str, Any]) -> str:
    """Returns the tables of a result, the anchor test's own first, and a line that says how it was measured."""
    parts = [_agreement(result), _judged(result), _gradients(result), _errors(result)]
    judged = f", judge {result['judge']}" if result["judge"] else ""
    told = (
        f"`{result['command']}`: {result['pairs']} pairs, {result['draws']} draws of (timestep, noise) per pair, seed "
        f"{result['seed']}{judged}; {result['trained_weights']:,} trained weights ({result['trained']}), "
        f"{result['precision']}; samples by {result['sampler']}; {result['seconds']:.0f} s on {result['device']}, "
        f"torch {result['torch']}, commit {result['commit']}."
    )
    return "\n\n".join([*(part for part in parts if part), told])


def _agreement(result: dict[str, Any]) -> str:
    """Returns the table of how the sign of one draw of D_w agrees with the others' mean; empty without a checkpoint."""
    if not result["checkpoints"]:
        return ""
    head = ["policy", "weights moved", "mean D_w", "mean abs D_w", "time", "one draw agrees", "majority"]
    rows = []
    for found in result["checkpoints"]:
        moved = [f"{found['weight_distance']:.2%}", f"{found['mean_d_w']:+.2e}", f"{found['mean_abs_d_w']:.2e}"]
        by_band = found["agreement_by_band"]
        parts = [("all", found["agreement"]), *((_band(i, len(by_band)), part) for i, part in enumerate(by_band))]
        for place, (time, part) in enumerate(parts):
            first = [_policy(found), *moved] if not place else ["", "", "", ""]
            numbers = [_number(part["agree"], ".3f"), _number(part["majority"], ".3f")]
            rows.append([*first, time, *numbers, f"{part['draws']:,}", f"{part['ties']:,}"])
    return _markdown([*head, "draws", "ties left out"], rows)


def _judged(result: dict[str, Any]) -> str:
    """Returns the table of areas under ROC curves; empty without a judge."""
    if not result["judge"]:
        return ""
    head = ["policy", "x_l is", "score", "AUC, one draw [95 %]", f"mean of {result['draws']} draws [95 %]", "yes / no"]
    rows, named = [], [("base", result["base"]), *((_policy(found), found) for found in result["checkpoints"])]
    for name, found in named:
        for place, row in enumerate(found["auc"]):
            one, mean = row["one_draw"], row["mean_of_draws"]
            left_out = f", {one['left_out']} left out" if one["left_out"] else ""
            verdict = f"{one['positives']} / {one['negatives']}{left_out}"
            rows.append(["" if place else name, row["verdict"], row["score"], _area(one), _area(mean), verdict])
    means = "; ".join(
        f"{name}: " + ", ".join(f"{what} {_number(s['mean'], '.3f')} ({s['pairs']})" for what, s in judged.items())
        for name, judged in ((name, found["judged"]) for name, found in named)
    )
    return f"{_markdown(head, rows)}\n\nMean scores (pairs). {means}. Here x_l is: {result['x_l']}."


def _gradients(result: dict[str, Any]) -> str:
    """Returns the table of the mean gradients at the base: norms, and how the samples' compare with the winners'."""
    found = result["base"]["gradients"]
    against = [one.get("against_winners") for one in found.values()]
    rows = [
        ["norm", *(_number(one["norm"], ".4g") for one in found.values())],
        ["norm, without noise", *(_number(one["norm_without_noise"], ".4g") for one in found.values())],
        ["cosine of two halves of the pairs", *(_number(one["cosine_of_halves"], ".3f") for one in found.values())],
    ]
    for key, form in (("ratio", ".3g"), ("cosine", ".3f")):
        what = f"{key} {'to' if key == 'ratio' else 'with'} winners"
        rows.append([what, *("" if one is None else _number(one[key], form) for one in against)])
        halves = ["" if one is None else [_number(part, form) for part in one[f"{key}_of_halves"]] for one in against]
        rows.append([f"{what}, in each half", *(" / ".join(parts) for parts in halves)])
        clean = ["" if one is None else _number(one[f"{key}_without_noise"], form) for one in against]
        rows.append([f"{what}, without noise", *clean])
    return _markdown(["gradient at the base of the mean error of", *found], rows)


def _errors(result: dict[str, Any]) -> str:
    errors = result["base"]["errors"]
    count = len(next(iter(errors.values())))
    rows = []
    for band in range(count):
        parts = [found[band] for found in errors.values()]
        rows.append([_band(band, count), *(_number(part["mean"], ".4f") for part in parts), f"{parts[0]['draws']:,}"])
    return _markdown(["time", *(f"error of {name}" for name in errors), "draws of each"], rows)


def _policy(found: dict[str, Any]) -> str:
    return f"{found['run']}, update {found['update']}"


def _band(number: int, count: int) -> str:
    return f"{100 * number // count} to {100 * (number + 1) // count} %"


def _area(found: dict[str, Any]) -> str:
    if found["auc"] is None:
        return "none"
    return f"{found['auc']:.3f} [{_number(found['low'], '.3f')}, {_number(found['high'], '.3f')}]"


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose columns are padded so that they line up as plain text."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
