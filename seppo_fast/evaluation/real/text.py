"""The metrics as tables in Markdown, in the form of the paper's table of clips, and as printed lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seppo_fast.evaluation.media.items import BASE, SUFFIXES, Media
from seppo_fast.evaluation.metrics.kernel import SUBSETS
from seppo_fast.evaluation.scoring.markdown import differences_table, interval_text, table_row

_PAIRS = (
    "compare each file with the one real file of its prompt, which is one of many right answers: they measure "
    "similarity to it, not quality."
)
_LPIPS = (
    " LPIPS: the mean over layers' own resolutions (spatial=False, the default of its package); tools that enlarge the "
    "layers first (spatial=True), such as common_metrics_on_video_quality, give slightly other values."
)
_RULE_OF_PICTURES = (
    "Real pictures: the centre square, resized to the generated size (Lanczos); Inception sees them at their own size."
)
_RULE_OF_CLIPS = (
    "Real clips: as many frames as generated ones, evenly spaced from first to last; of each the centre square, "
    "resized to the generated size (Lanczos)."
)


def metrics_text(media: Media, section: Mapping[str, Any]) -> str:
    """Returns the tables of the metrics, every note in the caption.

    Args:
        media: the items.
        section: the result of `metrics_section`.
    """
    found: Mapping[str, Any] = section["values"]
    lines = [""]
    if found:
        lines += ["**Against real pictures or clips**", ""]
        lines += [table_row(["", *(_head(metric) for metric in found.values())]), table_row(["---"] * (len(found) + 1))]
        for model in media.models:
            lines.append(table_row([model, *(_cell(metric, model) for metric in found.values())]))
        lines.append("")
    lines += [f"{line}  " for line in _caption(section)]
    if found:
        clips = media.items[0].files[BASE].endswith(SUFFIXES[1])
        lines.append(f"{_RULE_OF_CLIPS if clips else _RULE_OF_PICTURES}  ")
    pairs = {name: metric for name, metric in found.items() if metric["kind"] == "pairs"}
    distances = {name: metric for name, metric in found.items() if metric["kind"] != "pairs"}
    for run in [name for name in media.models if name != BASE]:
        if pairs:
            lines += ["", *differences_table(pairs, run, "metric")]
        if distances:
            lines += ["", *_differences(distances, run)]
    return "\n".join(lines) + "\n"


def metrics_lines(section: Mapping[str, Any] | None) -> list[str]:
    """Returns what the command prints about the metrics, if there are any: a line per metric and run."""
    if section is None:
        return []
    lines = []
    for name, metric in section["values"].items():
        for run, change in metric["runs"].items():
            before, after = (_cell(metric, model) or "no value" for model in (BASE, run))
            lines.append(f"{name}: base -> {run}: {before} -> {after}{_change(change)}")
        if metric["kind"] != "pairs":
            lines.append(f"{name}: n = {metric['n_real']} real, {metric['n_generated']} generated; {_floor(metric)}")
        notes = [metric["models"][BASE]["warning"]] if metric["kind"] == "frechet" else []
        lines += [f"{name}: {note}" for note in notes if note]
    return lines + [f"{name}: no value ({why})" for name, why in section["missing"].items()]


def _change(found: Mapping[str, Any]) -> str:
    if found["difference"] is None:
        return ""
    interval = interval_text(found, "low", "high", "+.4g")
    return f", difference {found['difference']:+.4g}{f' {interval}' if interval else ''}"


def _head(metric: Mapping[str, Any]) -> str:
    better = "higher" if metric.get("higher_is_better") else "lower"
    return f"{metric['label']} ({better} is closer)"


def _cell(metric: Mapping[str, Any], model: str) -> str:
    if metric["kind"] == "pairs":
        mean = metric["means"][model]
        return "" if mean is None else f"{mean:.4g}"
    found = metric["models"][model]
    interval = interval_text(found, "low", "high", ".4g")
    return f"{found['value']:.4g}{f' {interval}' if interval else ''}"


def _caption(section: Mapping[str, Any]) -> list[str]:
    found = section["values"]
    lines = []
    if labels := [metric["label"] for metric in found.values() if metric["kind"] == "pairs"]:
        lines.append(f"{', '.join(labels)} {_PAIRS}{_LPIPS if 'lpips' in found else ''}")
    for metric in found.values():
        real = metric["real"]
        files = f"{real['count']} real files of {real['name']}"
        if metric["kind"] == "pairs":
            lines.append(f"{metric['label']}: means over {metric['n']} files per model; {files}.{_unverified(metric)}")
            continue
        frames = f", {metric['frames']} frames of each file" if metric["frames"] > 1 else ""
        lines.append(
            f"{metric['label']}: {metric['dimensions']} features of {metric['features']}{frames}; n = "
            f"{metric['n_real']} real ({files}), {metric['n_generated']} generated per model; {_spread(metric)}"
            f"{_unverified(metric)}"
        )
        if metric["kind"] == "frechet" and metric["models"][BASE]["warning"]:
            lines.append(f"{metric['label']} of base: {metric['models'][BASE]['warning']}.")
    return lines + [f"{name}: no value ({why})." for name, why in section["missing"].items()]


def _spread(metric: Mapping[str, Any]) -> str:
    """Returns what a distance must be read with: floor, and where its interval comes from."""
    if metric["resamples"] is None:
        deviation = metric["models"][BASE]["deviation"]
        subsets = f"means over {SUBSETS} subsets of {metric['subset']}"
        return f"{_floor(metric)}; {subsets}, with a standard deviation of {deviation:.2g} for base, no intervals."
    if metric["models"][BASE]["low"] is None:
        return f"{_floor(metric)}; no intervals, because all generated files belong to one prompt."
    return f"{_floor(metric)}; 95 % intervals from {metric['resamples']} resamples."


def _floor(metric: Mapping[str, Any]) -> str:
    """Returns what a distance is for equal distributions."""
    if metric["kind"] == "kernel":
        return "its expectation for equal distributions is 0"
    items, others = metric["floor_items"], metric["floor_others"]
    few = ", which overstates the floor at the generated number" if items < metric["n_generated"] else ""
    return f"floor, {items} real against {others} other real samples: {metric['floor']:.4g}{few}"


def _unverified(metric: Mapping[str, Any]) -> str:
    return " The network is unverified on the true weights." if metric["unverified"] else ""


def _differences(distances: Mapping[str, Any], run: str) -> list[str]:
    lines = [
        f"**{run} against base**, distances to the same real samples. Negative: {run} is closer to them. Each resample "
        "draws the same prompts for both, so bias that both share cancels.",
        "",
        table_row(["metric", "difference", "95 % interval", "resamples"]),
        table_row(["---"] * 4),
    ]
    for metric in distances.values():
        change = metric["runs"][run]
        interval = interval_text(change, "low", "high", "+.4g")
        lines.append(
            table_row([metric["label"], f"{change['difference']:+.4g}", interval, str(metric["resamples"] or "")])
        )
    return lines
