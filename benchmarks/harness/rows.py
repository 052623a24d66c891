"""What every suite reports: one row for each provider of each case, baselines included."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from typing import Any

from benchmarks.harness.provenance import commit

# Providers and phases of `endtoend`; the row of a phase has the case `CASE / PHASE`.
NAIVE, NAIVE_FAST, OURS = "naive loop", "naive loop, same settings", "ours"
NAIVE_BATCH, NAIVE_FAST_BATCH = "naive loop, same micro-batch", "naive loop, same settings and micro-batch"
GENERATION, ENCODING, REFERENCE = "generation", "encoding", "reference forward"
POLICY, OPTIMIZER = "policy forward + backward", "optimizer"
PHASES = (GENERATION, ENCODING, REFERENCE, POLICY, OPTIMIZER)
SEPARATOR = " / "


@dataclass(frozen=True)
class Row:
    """The result of one provider in one case. None: not measured.

    Times are per unit: a sample, a pair, or a call on all pairs.

    Attributes:
        suite: the suite's name.
        case: what was done, with its sizes; a phase of a case is `CASE / PHASE`.
        provider: the implementation that was measured.
        baseline: the provider that `ratio` compares with.
        value_ok: whether the values agree with the baseline's.
        p20_ms: milliseconds per unit, the 20 % quantile over the rounds.
        p50_ms: the same, median.
        p80_ms: the same, 80 % quantile.
        graph_p50_ms: the median milliseconds per unit when replayed from a CUDA graph.
        ratio: the baseline's p50 divided by this one's; None if the values differ.
        launches: kernel launches, by the profiler, per solver step, training step or call.
        host_syncs: how often the host waits for the device, per the same.
        peak_allocated_bytes: peak device memory, including all that the provider holds.
        limit: the name of the limit: `matmul` or `copy`.
        limit_fraction: fraction of the limit's rate that was reached.
        mfu: counted FLOP per second divided by the device's nominal dense peak.
        pairs_per_s: samples or pairs per second.
        gb_per_s: 10^9 bytes moved per second, by a byte model, for memory-bound work.
        share_of_step: a phase's share of the provider's time for a whole unit; for a loss, its time relative to a
            training step's; for a switch, relative to the learning between two draws.
    """

    suite: str
    case: str
    provider: str
    baseline: str
    value_ok: bool
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    graph_p50_ms: float | None = None
    ratio: float | None = None
    launches: float | None = None
    host_syncs: float | None = None
    peak_allocated_bytes: int | None = None
    limit: str | None = None
    limit_fraction: float | None = None
    mfu: float | None = None
    pairs_per_s: float | None = None
    gb_per_s: float | None = None
    share_of_step: float | None = None


STAMP = ("device", "versions", "commit")
KEYS = (*(field.name for field in fields(Row)), *STAMP)
_PACKAGES = ("torch", "diffusers", "peft", "accelerate", "transformers")


def with_ratios(rows: list[Row]) -> list[Row]:
    """Returns the rows of one case with `ratio` set; it stays None if the values differ from the baseline's."""
    times = {row.provider: row.p50_ms for row in rows}

    def ratio(row: Row) -> float | None:
        baseline = times.get(row.baseline)
        return baseline / row.p50_ms if row.value_ok and baseline and row.p50_ms else None

    return [replace(row, ratio=ratio(row)) for row in rows]


def records(rows: list[Row], device: str) -> list[dict[str, Any]]:
    """Returns the rows as written to JSON, with `KEYS`, including device, versions and commit."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    return [asdict(row) | {"device": device, "versions": versions, "commit": commit()} for row in rows]


_HEADINGS = (
    "", "ms", "p20-p80", "graph ms", "ratio", "values", "/s", "share", "of limit", "GB/s", "MFU", "GB",
    "launches", "syncs",
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """Returns a table for a terminal: one line per row, under a line for its case; empty columns are omitted."""
    limits = dict.fromkeys(row.limit for row in rows if row.limit)
    headings = tuple(f"of {', '.join(limits)}" if name == "of limit" else name for name in _HEADINGS)
    cells = [headings, *[_cells(row) for row in rows]]
    kept = [column for column in range(len(_HEADINGS)) if any(line[column] for line in cells[1:])]
    widths = [max(len(line[column]) for line in cells) for column in kept]

    def line(row: tuple[str, ...]) -> str:
        padded = [row[column].rjust(width) for column, width in zip(kept, widths, strict=True)]
        return "  ".join(["  " + row[0].ljust(widths[0]), *padded[1:]]).rstrip()

    lines, case = [line(headings)], ""
    for row, texts in zip(rows, cells[1:], strict=True):
        if row.case != case:
            case = row.case
            lines.append(case)
        lines.append(line(texts))
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "" if value is None else format(value * scale, form)

    spread = "" if row.p20_ms is None else f"{row.p20_ms:.4g}-{row.p80_ms:.4g}"
    return (
        row.provider,
        number(row.p50_ms, ".4g"),
        spread,
        number(row.graph_p50_ms, ".4g"),
        "" if row.ratio is None else f"{row.ratio:.2f} x",
        "ok" if row.value_ok else "DIFFER",
        number(row.pairs_per_s, ".3g"),
        number(row.share_of_step, ".1%"),
        number(row.limit_fraction, ".1%"),
        number(row.gb_per_s, ".4g"),
        number(row.mfu, ".1%"),
        number(row.peak_allocated_bytes, ".2f", 1e-9),
        number(row.launches, ".0f"),
        number(row.host_syncs, ".2g"),
    )
