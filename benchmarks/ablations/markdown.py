"""Formats the ablation's tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.ablations.rows import GUIDANCE, SEPPO, UPDATES

_SCALES = [f"{scale:g}" for scale in GUIDANCE]
_REGIMES = {
    "after-sft": "after SFT (120 updates), against what SFT left",
    "64-winners": "64 winners",
    "wrong-captions": "a fifth of the captions wrong",
    "model-made": "model-made winners (best of four by the judge), losers through pixels",
}


def ablation_tables(result: dict[str, Any]) -> str:
    """Returns the tables for rendered winners: at equal updates and samples, and at equal compute."""
    rows = result["rows"]
    if not rows:
        return "Not measured yet."
    seppo = next((row for row in rows if row["row"] == SEPPO), None)
    parts = [
        f"Equal updates and pairs ({UPDATES} x 128), and equal samples ({UPDATES} x 32) for all rows that generate:",
        _table((row for row in rows if row["update"] == UPDATES), seppo),
    ]
    if seppo is not None:
        cost = seppo["row_forwards"]
        near = [row for row in rows if abs(row["row_forwards"] / cost - 1) < 0.05]
        parts += [
            f"Equal compute ({cost:,} rows through the network within 5 %, a backward counted as two):",
            _table(near, seppo),
        ]
    return "\n\n".join([*parts, _origin(result)])


def regime_tables(result: dict[str, Any]) -> str:
    """Returns one table per regime, all at equal updates."""
    parts = []
    for regime, title in _REGIMES.items():
        rows = [row for row in result["regimes"] if row["regime"] == regime]
        if rows:
            seppo = next((row for row in rows if row["row"] == SEPPO), None)
            parts += [f"Regime: {title}", _table(rows, seppo)]
    return "\n\n".join([*parts, _origin(result)]) if parts else "Not measured yet."


def _table(rows: Iterable[dict[str, Any]], seppo: dict[str, Any] | None) -> str:
    """Returns one table, sorted by the gain at the first guidance scale, best first."""
    heads = [f"guidance {scale}: gain over the base [95 %], over SePPO" for scale in _SCALES]
    lines = [f"| method | lr | seeds | cost | winner error | {' | '.join(heads)} |", "|---|---|---|---|---|---|---|"]
    first = f"guidance {_SCALES[0]}"
    for row in sorted(rows, key=lambda row: -row[first]["difference"]):
        cost = f"{row['row_forwards'] / seppo['row_forwards']:.2f}" if seppo else f"{row['row_forwards']:,}"
        name = f"**{row['title']}**" if row["row"] == SEPPO else row["title"]
        after = "" if row["update"] == UPDATES else f", {row['update']} updates"
        cells = [name + after, f"{row['rate']:g}", str(len(row["seeds"])), cost, f"{row['winner_error']:.4f}"]
        lines.append(f"| {' | '.join(cells + [_gain(row[f'guidance {scale}']) for scale in _SCALES])} |")
    return "\n".join(lines)


def _gain(compared: dict[str, Any]) -> str:
    text = interval(compared)
    return f"{text}, {interval(compared['against_seppo'])}" if "against_seppo" in compared else text


def interval(compared: dict[str, Any]) -> str:
    """Returns a paired difference with its interval."""
    return f"{compared['difference']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]"


def _origin(result: dict[str, Any]) -> str:
    base = ", ".join(f"{score:.3f} at guidance {scale}" for scale, score in result["base"].items())
    return (
        f"`{result['command']}`: {result['prompts']} held-out prompts, the same for each training seed. "
        f"Base {base}. Cost: rows through the network, relative to SePPO's; commits {', '.join(result['commits'])}."
    )
