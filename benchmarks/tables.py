"""Fills the generated tables of README.md and docs/: `python -m benchmarks.tables`.

A table is everything between `<!-- NAME -->` and `<!-- /NAME -->`; do not edit it by hand. Measured tables come from
the committed files in `benchmarks/results`, the table of configuration keys from the schema.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks.ablations.markdown import ablation_tables, interval, regime_tables
from benchmarks.anchor import anchor_table
from benchmarks.census import census_table
from benchmarks.comparison.tables import method_tables
from benchmarks.exactness import exactness_table
from benchmarks.harness.rows import SEPARATOR
from benchmarks.harness.speed import SUITES, phase_chart, projection, speed_table
from seppo_fast.config.schema import ALIASES, Config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "Not measured yet."
_WIDTH = 120
_PLACE = re.compile(r"(<!-- (?P<name>[a-z-]+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)


def pages() -> list[Path]:
    """Returns the Markdown files that may hold tables: the README and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def demo_table(result: dict[str, Any]) -> str:
    """Returns the table of gains per training seed: the demo's and, if measured, those of SFT on the same winners."""
    base = result["base"]
    lines = [
        f"| | seed | {' | '.join(f'guidance {scale}: gain [95 %]' for scale in base)} |",
        f"|---|---|{'---|' * len(base)}",
        f"| base | | {' | '.join(f'{score:.3f}' for score in base.values())} |",
    ]
    for row in result["rows"]:
        cells = [interval(gain) for gain in row["gains"].values()]
        lines.append(f"| {row['title']} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"`{result['command']}`: {result['items']} held-out prompts; the first run took {result['seconds']:.0f} s "
            f"on {result['cores']} CPU cores, including judging but not installation; torch {result['torch']}, commits "
            f"{result['commit']}.",
        ]
    )


def full_size_table(result: dict[str, Any]) -> str:
    """Returns the table of seconds per phase of one full-size update, for pictures or clips."""
    size = " x ".join(str(side) for side in (result.get("frames"), *2 * [result["resolution"]]) if side)
    recomputed = ", activations recomputed" * result.get("gradient_checkpointing", False)
    phases = ["write random weights", "load, encode", "roll out", "learn", "save"]
    lines = ["| phase | seconds |", "|---|---|"]
    lines += [f"| {phase} | {result['seconds'][phase]:.1f} |" for phase in phases]
    lines += [
        f"| peak memory | {result['peak_memory_gib']:.1f} GiB |",
        "",
        f"`{result['command']}`: {result['parameters'] / 1e6:.1f} M parameters, {result['pairs']} "
        f"pair{'s' * (result['pairs'] > 1)}, {result['steps']} guided DDIM steps, {size}, {result['precision']}"
        f"{recomputed}, "
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}.",
    ]
    return "\n".join(lines)


def soak_table(result: dict[str, Any]) -> str:
    """Returns the table of a soak test by `benchmarks.faults`."""
    hits = ", ".join(f"{count} x {name}" for name, count in sorted(result["disturbed"].items()))
    stalls = ", ".join(f"{100 * share:.1f} % ({kind})" for kind, share in result["save_stall"].items())
    rows = {
        "kills (SIGKILL)": f"{result['kills']:,}",
        "all disturbances": hits,
        "finished runs": f"{result['runs']}, with {result['updates']} updates each; every byte compared",
        "**corrupt resumes**": f"**{len(result['corrupt'])}**",
        "updates repeated per resume": f"{result['lost_mean']:.2f} on average, {result['lost_most']} at most",
        "from the command to the first update": f"{result['seconds_to_first_update']:.2f} s for a new run, "
        f"{result['seconds_to_resumed_update']:.2f} s for a resumed one (medians; excludes about 5 s of imports)",
        "share of training time spent waiting for saves, with a state saved after every update": stalls,
    }
    return "\n".join(
        [
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows.items()),
            "",
            f"`{result['command']}`: {result['seconds'] / 60:.0f} minutes on {result['device']}, torch "
            f"{result['torch']}, commit {result['commit']}.",
        ]
    )


def flat_line(result: dict[str, Any]) -> str:
    """Returns the line that reports the growth of resources measured by `benchmarks.flat`."""
    growth, last = result["growth"], result["last"]
    return (
        f"`{result['command']}`: growth over {result['updates']:,} updates, from the second quarter to the last: "
        f"memory {growth['memory'] / 2**20:+.1f} MiB (of {last['memory'] / 2**20:.0f}), threads "
        f"{growth['threads']:+.0f}, open files {growth['handles']:+.0f}, files on disk "
        f"{growth['files']:+.0f}; commit {result['commit']}."
    )


def suite_rows(on_cpu: bool) -> list[dict[str, Any]]:
    """Returns the newest committed rows per case and device, from the files measured on CPUs or those from GPUs.

    Files are named `DEVICE-YYYYMMDD-COMMIT-SUITE.json`, where DEVICE is `cpu` or the GPU's name. A file with
    `gpu-check` in place of the suite holds rows of several suites, and counts as older than the other files of its day.
    Adds the key `command` to each row: the command that measured it.
    """
    newest: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    files = RESULTS.glob("*-[0-9]*-*.json")
    for file in sorted(files, key=lambda file: (file.stem.split("-")[1], not _is_check(file))):
        if file.name.startswith("cpu-") != on_cpu:
            continue
        cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for row in json.loads(file.read_text(encoding="utf-8")):
            command = "benchmarks.gpu_check" if _is_check(file) else f"benchmarks.run --suite {row['suite']}"
            key = row["suite"], row["device"], row["case"].partition(SEPARATOR)[0]
            cases.setdefault(key, []).append(row | {"command": f"python -m {command}"})
        newest |= cases
    return [row for rows in newest.values() for row in rows]


def _is_check(file: Path) -> bool:
    return file.stem.endswith("-gpu-check")


def configuration_table() -> str:
    """Returns the table of configuration keys with default, aliases and description, section by section."""
    aliases: dict[str, list[str]] = {}
    for alias, key in ALIASES.items():
        aliases.setdefault(key, []).append(f"`{alias}`")
    lines = ["| key | default | also accepted as | what it sets |", "|---|---|---|---|"]
    for key, default, text in _keys(Config):
        shown = json.dumps(default if not isinstance(default, tuple) else list(default))
        lines.append(f"| `{key}` | `{shown}` | {', '.join(aliases.get(key, []))} | {text} |".replace("|  |", "| |"))
    return "\n".join(lines)


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields key, default and description of each key; a section's own keys precede those of its subsections."""
    inner = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            inner[name] = field.annotation
        else:
            assert field.description, f"{prefix}{name} has no description"
            yield prefix + name, field.default, field.description
    for name, model in inner.items():
        yield from _keys(model, f"{name}.")


def tables() -> dict[str, str]:
    """Returns every table by name; a table without a committed result is `NOT_MEASURED`."""
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "demo": demo_table,
        "demo-video": demo_table,
        "ablation": ablation_tables,
        "methods": method_tables,
        "anchor": anchor_table,
        "full-size": full_size_table,
        "full-size-clips": full_size_table,
        "census": census_table,
        "exactness": exactness_table,
        "faults": soak_table,
        "flat": flat_line,
    }
    made = {"configuration": configuration_table()}
    for name, make in makers.items():
        file = RESULTS / f"{name}.json"
        made[name] = make(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else NOT_MEASURED
    ablation = RESULTS / "ablation.json"
    result = json.loads(ablation.read_text(encoding="utf-8")) if ablation.exists() else {"regimes": []}
    made["regimes"] = regime_tables(result)
    on_cpu, on_gpu = suite_rows(on_cpu=True), suite_rows(on_cpu=False)
    for suite in SUITES:
        made[f"speed-cpu-{suite}"] = speed_table([row for row in on_cpu if row["suite"] == suite])
    made["speed-gpu"] = f"{speed_table(on_gpu)}\n\n{projection(on_gpu)}"
    made["speed"] = speed_table([row for row in on_gpu or on_cpu if row["suite"] == "endtoend"])
    return {name: _wrapped(table) for name, table in made.items()}


def _wrapped(table: str) -> str:
    """Breaks lines of prose at 120 characters; table rows must stay on one line in Markdown."""
    lines = []
    for line in table.splitlines():
        wrap = len(line) > _WIDTH and not line.startswith("|")
        lines += textwrap.wrap(line, _WIDTH, break_long_words=False, break_on_hyphens=False) if wrap else [line]
    return "\n".join(lines)


def fill(text: str) -> str:
    """Returns a page's text with every table regenerated.

    Raises:
        KeyError: the page names a table that does not exist.
    """
    made = tables()
    return _PLACE.sub(lambda place: f"{place[1]}{made[place['name']]}\n{place[3]}", text)


def main() -> None:
    """Rewrites the tables of README.md and docs/ in place, and redraws the chart of the time per pair by phase."""
    rows = suite_rows(on_cpu=False) or suite_rows(on_cpu=True)
    phase_chart(rows, RESULTS / "phases.png")
    for page in pages():
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
