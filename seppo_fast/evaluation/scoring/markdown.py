"""The results of scored media as tables in Markdown: scores.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seppo_fast.evaluation.media.items import BASE, Media
from seppo_fast.scorers import registry

# The published scorers of the paper's tables, in its order; their columns are shown even if they are empty.
PUBLISHED = ("pickscore", "hpsv2.0", "hpsv2.1", "imagereward", "aesthetic")


def markdown(media: Media, tree: Mapping[str, Any]) -> str:
    """Returns the table in the form of the paper's: a row per model, a column per scorer, and every note below it."""
    scorers = tree["scorers"]
    columns = {name: [key for key in scorers if scorers[key]["scorer"] == name] or [None] for name in PUBLISHED}
    columns |= {row["scorer"]: [] for row in scorers.values() if row["scorer"] not in PUBLISHED}
    for key, row in scorers.items():
        if row["scorer"] not in PUBLISHED:
            columns[row["scorer"]].append(key)
    pairs = [(name, key) for name, keys in columns.items() for key in keys]
    heads = [f"{_label(name)}{_arrow(scorers.get(key))}" for name, key in pairs]
    lines = [table_row(["", *heads]), table_row(["---"] * (len(heads) + 1))]
    for model in media.models:
        lines.append(table_row([model, *(_cell(scorers, key, model) for _, key in pairs)]))
    lines += ["", *(f"{line}  " for line in _caption(media, tree))]
    for run in [name for name in media.models if name != BASE]:
        lines += ["", *differences_table(scorers, run, "scorer")]
    return "\n".join(lines) + "\n"


def score_lines(scorers: Mapping[str, Any]) -> list[str]:
    """Returns what the command prints about scores: a line per scorer and run."""
    lines = []
    for key, row in scorers.items():
        for run, found in row["runs"].items():
            means = f"{row['means'][BASE]:.4g} -> {row['means'][run]:.4g}" if found["base"] is not None else "no score"
            interval = f", difference {found['difference']:+.4g}" if found["difference"] is not None else ""
            ends = interval_text(found, "low", "high", "+.4g")
            lines.append(f"{key}: base -> {run}: {means}{interval}{f' {ends}' if ends else ''}")
    return lines


def _label(name: str) -> str:
    return registry.SCORERS[name].label if name in registry.SCORERS else name


def _arrow(scorer: Mapping[str, Any] | None) -> str:
    return "" if scorer is None or scorer["higher_is_better"] else " (lower is better)"


def _cell(scorers: Mapping[str, Any], key: str | None, model: str) -> str:
    mean = None if key is None else scorers[key]["means"][model]
    return "" if mean is None else f"{mean:.4g}"


def table_row(cells: Sequence[str]) -> str:
    """Returns a row of a table."""
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _caption(media: Media, tree: Mapping[str, Any]) -> list[str]:
    """Returns the notes of the table: what was scored, how, by what, and why columns are empty."""
    prompts, protocol = tree["prompts"], tree["protocol"]
    distinct = len({item.prompt for item in media.items})
    lines = [
        f"Means over {len(media.items)} files per model: {prompts['count']} prompts of {prompts['name']} "
        f"({distinct} distinct), {tree['samples']} per prompt, seed {tree['seed']}; every model starts from the same "
        "noise.",
        f"Sampling: protocol {protocol['name']} ({protocol['source']}); {protocol['sampler']['name']}, "
        f"{protocol['sampler']['steps']} steps, guidance {protocol['sampler']['guidance']:g}, {protocol['resolution']} "
        f"pixels, {protocol['precision']} on {protocol['device']}.",
    ]
    for name, model in tree["models"].items():
        if name != BASE:
            lines.append(
                f"{name}: after update {model['update']}, {'moving average' if model['average'] else 'raw weights'}."
            )
    for key, row in tree["scorers"].items():
        cut = f", {row['cut']} prompts truncated" if row["cut"] else ""
        lines.append(f"{row['scorer']}: {key}, digest {row['digest'][:12]}{cut}.")
    lines += [f"{_label(name)}: no scores ({why})." for name, why in tree["missing"].items()]
    return lines


def differences_table(scorers: Mapping[str, Any], run: str, kind: str) -> list[str]:
    """Returns the lines of the table that compares a run with the base.

    Args:
        scorers: what `comparisons` returns.
        run: the run's name.
        kind: the noun for what is compared: scorer or metric.
    """
    lines = [
        f"**{run} against base**, per distinct prompt. Intervals: 95 %, over prompts, not over training seeds. Win "
        "rate: ties count half; its interval is Wilson's, without ties. p: sign-flip test, adjusted for the number of "
        f"{kind}s (Holm).",
        "",
        table_row([kind, "difference", "bootstrap", "wins", "ties", "losses", "win rate", "wins of decided", "p"]),
        table_row(["---"] * 9),
    ]
    for key, row in scorers.items():
        found = row["runs"][run]
        counts = [str(found[name]) if found[name] is not None else "" for name in ("wins", "ties", "losses")]
        cells = [key, _interval(found), interval_text(found, "bootstrap_low", "bootstrap_high", "+.4g"), *counts]
        cells += [_text(found["win_rate"], ".3f"), interval_text(found, "win_low", "win_high", ".3f")]
        lines.append(table_row([*cells, _text(found["p_holm"], ".3g")]))
    return lines


def _interval(found: Mapping[str, Any]) -> str:
    left_out = f", {found['left_out']} without a score" if found["left_out"] else ""
    ends = interval_text(found, "low", "high", "+.4g")
    return f"{_text(found['difference'], '+.4g')} {ends} ({found['items']} prompts{left_out})"


def interval_text(found: Mapping[str, Any], low: str, high: str, form: str) -> str:
    """Returns an interval as text, from the values under two keys; empty without one."""
    return "" if found[low] is None else f"[{found[low]:{form}}, {found[high]:{form}}]"


def _text(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
