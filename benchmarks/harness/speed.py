"""Makes the documentation's speed tables, chart and projection from the rows that `benchmarks.run --json` wrote.

Rows may come from several suites and devices. Values that were not measured stay empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.rows import NAIVE, NAIVE_BATCH, NAIVE_FAST, NAIVE_FAST_BATCH, OURS, PHASES, SEPARATOR

PAPER_UPDATES, PAPER_PAIRS = 210, 2048
CHECK = "gpu_check"
SUITES = ("endtoend", "sampling", "step", "kernels", "cache", "video", "score")
_LIMIT, _SHARE = "of limit", "share"
_SHARES = {"kernels": "of a step", "cache": "of the learning"}  # `endtoend` has shares of phases, which the chart shows
_HEADINGS = (
    "ms", "in a graph", "x baseline", "per second", "MFU", "GB/s", _LIMIT, _SHARE, "peak GB", "launches", "host syncs",
)  # fmt: skip

# Names of `endtoend`'s providers in the chart, where the mode already tells their settings.
_BARS = {OURS: OURS, NAIVE_FAST: NAIVE, NAIVE_BATCH: f"{NAIVE} in batches", NAIVE_FAST_BATCH: f"{NAIVE} in batches"}

Rows = Sequence[dict[str, Any]]


def speed_table(rows: Rows) -> str:
    """Returns one Markdown table per suite, with every case and provider but not their phases, and the commands used.

    Columns without a measured value are omitted, and so is a case's name if the line above has it.
    """
    parts = [_checked([row for row in rows if row["suite"] == CHECK])]
    parts += [_suite_table(suite, [row for row in rows if row["suite"] == suite]) for suite in SUITES]
    return "\n\n".join(part for part in parts if part) or "Not measured yet."


def _origin(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["device"], row["versions"]["torch"], row["commit"]


def _checked(rows: Rows) -> str:
    """Returns how many of the values that `gpu_check` compares are right, and which are not, for each place it ran."""
    lines = []
    for origin in dict.fromkeys(map(_origin, rows)):
        here = [row for row in rows if _origin(row) == origin]
        wrong = [row["case"] for row in here if not row["value_ok"]]
        lines.append(
            f"{len(here) - len(wrong)} of {len(here)} values right{'; wrong: ' * bool(wrong)}{'; '.join(wrong)}. "
            f"`python -m benchmarks.gpu_check`: {origin[0]}, torch {origin[1]}, commit {origin[2]}."
        )
    return "\n\n".join(lines)


def _suite_table(suite: str, rows: Rows) -> str:
    chosen = [row for row in rows if row["provider"] != row["limit"] and SEPARATOR not in row["case"]]
    if not chosen:
        return ""
    cells = [_cells(row) for row in chosen]
    kept = [column for column in range(len(_HEADINGS)) if any(line[column] for line in cells)]
    limits = ", ".join(dict.fromkeys(f"{row['limit']}'s" for row in chosen if row["limit"]))
    named = {_LIMIT: f"of {limits} speed", _SHARE: _SHARES.get(suite, "")}
    headings = [named.get(name, name) for name in _HEADINGS]
    lines = [_markdown([suite, "", *[headings[column] for column in kept]]), "|---" * (2 + len(kept)) + "|"]
    before = None
    for row, line in zip(chosen, cells, strict=True):
        case = row["case"] if row["case"] != before else ""
        lines.append(_markdown([case, row["provider"], *[line[column] for column in kept]]))
        before = row["case"]
    by_suite = f"python -m benchmarks.run --suite {suite}"
    for command, device, torch, commit in dict.fromkeys(
        (row.get("command", by_suite), *_origin(row)) for row in chosen
    ):
        lines += ["", f"`{command}`: {device}, torch {torch}, commit {commit}."]
    return "\n".join(lines)


def three_digits(value: float) -> str:
    """Formats a number to three significant digits, never in exponent notation."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _markdown(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _cells(row: dict[str, Any]) -> list[str]:
    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row[key] is None else format(row[key] * scale, form)

    return [
        number("p50_ms", ".4g"),
        number("graph_p50_ms", ".4g"),
        number("ratio", ".2f") if row["value_ok"] else "values differ",
        "" if row["pairs_per_s"] is None else three_digits(row["pairs_per_s"]),
        number("mfu", ".1%"),
        number("gb_per_s", ".3g") if row["suite"] in ("cache", "video", "score") else "",
        number("limit_fraction", ".1%"),
        _share(row["share_of_step"]) if row["suite"] in _SHARES else "",
        number("peak_allocated_bytes", ".3g", 1e-9),
        number("launches", ".0f"),
        number("host_syncs", ".2g"),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else "< 0.01%" if value < 5e-5 else f"{value:.2%}"


def phase_chart(rows: Rows, file: Path) -> None:
    """Draws the time per pair by phase, naive loop against ours, from the rows of `endtoend`.

    Raises:
        ValueError: rows of `endtoend` are missing, not measured, or have values that differ from the baseline's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = _bars(rows)
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.9 + 0.55 * len(bars)), sharey=True, layout="constrained")
    whole = [sum(phases.values()) for phases in bars.values()]
    starts = [0.0] * len(bars)
    for phase in PHASES:
        widths = [phases[phase] for phases in bars.values()]
        axes[0].barh(list(bars), widths, left=starts, label=phase)
        shares = [width / total for width, total in zip(widths, whole, strict=True)]
        before = [start / total for start, total in zip(starts, whole, strict=True)]
        axes[1].barh(list(bars), shares, left=before)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, total in enumerate(whole):
        axes[0].text(total, place, f" {total:.3g}", va="center")
    axes[0].invert_yaxis()
    axes[0].margins(x=0.1)
    devices = dict.fromkeys(row["device"] for row in rows if row["suite"] == "endtoend")
    axes[0].set_xlabel(f"milliseconds per pair ({'; '.join(devices)})")
    axes[1].set_xlabel("share of the time per pair")
    figure.legend(loc="outside upper center", ncols=len(PHASES), frameon=False)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def _bars(rows: Rows) -> dict[str, dict[str, float]]:
    """Returns milliseconds by phase for each bar; the naive loop occurs in both modes and is drawn once."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        case, separator, phase = row["case"].partition(SEPARATOR)
        if row["suite"] != "endtoend" or not separator:
            continue
        if not row["value_ok"]:
            raise ValueError(f"rows: the values of {row['provider']!r} differ from the baseline's")
        mode = case.split(":")[0].split(" ")[0] + ", compiled" * case.endswith(", compiled")
        name = NAIVE if row["provider"] == NAIVE else f"{_BARS[row['provider']]}, {mode}"
        bars.setdefault(name, {})[phase] = row["p50_ms"]
    if not bars or any(set(bar) != set(PHASES) or None in bar.values() for bar in bars.values()):
        raise ValueError("rows: every phase of `endtoend` must have been measured")
    return bars


def projection(rows: Rows) -> str:
    """Returns the paper's whole run in GPU-hours at the measured pairs per second, labelled as a projection."""
    rates: dict[str, float] = {}
    for row in rows:
        whole = row["suite"] == "endtoend" and SEPARATOR not in row["case"]
        if whole and row["provider"] in (NAIVE, OURS) and row["value_ok"] and row["pairs_per_s"]:
            name = NAIVE if row["provider"] == NAIVE else f"{OURS}, {row['case']}"
            if not row["device"].startswith("CPU"):
                rates[name] = row["pairs_per_s"]
    if not rates:
        return "No projection of the paper's whole run: no GPU has run the suite `endtoend` yet."
    pairs = PAPER_UPDATES * PAPER_PAIRS
    hours = [f"{name}: {pairs / rate / 3600:,.1f} GPU-hours" for name, rate in rates.items()]
    return (
        f"A projection, not a measurement: the paper's whole run, {PAPER_UPDATES} updates of {PAPER_PAIRS} pairs, at "
        f"the pairs per second measured above (with a LoRA, where the paper trains all weights). {'; '.join(hours)}."
    )
