"""The curves of a report: which numbers of the log share a panel, and which updates are shaded or marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from seppo_fast.commands import curves
from seppo_fast.runs.watch import LARGEST, MOST_CLIPPED, most_clipped

_QUARTERS = ("first quarter (least noise)", "second", "third", "last (most noise)")


def _by_band(name: str) -> dict[str, str]:
    return {quarter: f"{name}_band{number}" for number, quarter in enumerate(_QUARTERS, 1)}


# Heading -> title of a panel -> label of a line -> key in the log.
_PANELS = {
    "Reward": {
        "reward of the iteration's samples, mean": {"reward": "reward_mean"},
        "reward, standard deviation": {"deviation": "reward_std"},
        "share of samples": {"that teach": "kept", "without a score": "unscored"},
        "prompts whose samples have equal rewards": {"share": "zero_spread"},
        "ratios outside the clip range": {"all steps": "clipped", "the step with most": MOST_CLIPPED},
        "KL term of the loss": {"term": "kl"},
    },
    "Curves": {
        "loss": {"loss": "loss"},
        "preference loss": {"loss": "preference_loss"},
        "winners' own term of the loss": {"term": "sft_loss"},
        "winner error": {"policy": "winner_error", "reference": "ref_winner_error"},
        "winner error minus the reference's": {"difference": "winner_difference"},
        "loser error": {"policy": "loser_error", "reference": "ref_loser_error"},
        "reject rate": {"reject": "aaf_rate"},
        "margin": {"margin": "margin"},
        "MaPO's margin, f(m_w) - f(m_l)": {"margin": "ratio_margin"},
        "RPO's weight of a winner's own loser": {"weight": "diagonal_weight"},
        "pairs in the right order": {"share": "correct"},
        "DITTO's share of pairs": {"earlier sample": "replayed", "newer over older": "newer_over_older"},
        "KTO's offset": {"offset": "offset"},
        "|logit|": {"logit": "logit_abs"},
        "gradient norm, before clipping": {"norm": "grad_norm"},
        "pairs per second": {"rate": "pairs_per_second"},
        "peak memory, GiB": {"memory": "memory_gib"},
    },
    "By timestep: quarters of the forward process": {
        "winner error minus the reference's, by timestep": _by_band("winner_difference"),
        "|logit|, by timestep": _by_band("logit_abs"),
        "reject rate, by timestep": _by_band("aaf_rate"),
    },
    "The gradient of winners and of losers": {
        "gradient norms of both": {"winners": "winner_grad_norm", "losers": "loser_grad_norm"},
        "cosine between them": {"cosine": "grad_cosine"},
    },
}
_SHADED = {
    "winner_error": "winner_above_reference",
    "winner_difference": "winner_above_reference",
    "logit_abs": "logits_large",
    "grad_norm": "gradient_grown",
    "loss": "losers_worse",
    "preference_loss": "losers_worse",
    "kept": "little_kept",
    "clipped": "step_clipped",
}
"""For the key of a panel's first line, the health rule whose spells are shaded in that panel."""


Spells = Mapping[str, Sequence[tuple[int, int]]]
"""The first and last update of each spell, by the name of its health rule."""


def panels(log: Sequence[Mapping[str, Any]], found: Spells) -> Iterator[str]:
    """Yields headings with their curves as HTML; headings and curves without any number are omitted.

    Args:
        log: the updates of a run, at least one.
        found: the spells to shade.
    """
    for heading, group in _PANELS.items():
        figures = [_figure(log, title, lines, found) for title, lines in group.items()]
        if any(figures):
            yield f'<h2>{escape(heading)}</h2><div class="curves">{"".join(figures)}</div>'


def _figure(log: Sequence[Mapping[str, Any]], title: str, lines: Mapping[str, str], found: Spells) -> str:
    names = list(lines.values())
    if names == ["preference_loss"] and not any("sft_loss" in entry for entry in log):
        return ""  # without an SFT term it equals the loss
    if "grad_cosine" in names or "winner_grad_norm" in names:
        log = [entry for entry in log if entry.get(names[0]) is not None]  # measured only every few updates
    drawn = {label: _column(log, name) for label, name in lines.items()}
    drawn = {label: values for label, values in drawn.items() if any(value is not None for value in values)}
    if not drawn:
        return ""
    return curves.curve(
        title,
        [entry["update"] for entry in log],
        drawn,
        intervals=found.get(_SHADED.get(names[0], ""), []),
        skipped=skipped(log) if "grad_norm" in names else [],
    )


def numbers(log: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Returns the finite values of a key in a log."""
    return [value for value in _column(log, name) if value is not None]


def _column(log: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    if name == "winner_difference":
        errors = (_column(log, "winner_error"), _column(log, "ref_winner_error"))
        return [None if a is None or b is None else a - b for a, b in zip(*errors, strict=True)]
    if name == MOST_CLIPPED:
        log = [most_clipped(entry) for entry in log]
    values = [entry.get(name) for entry in log]
    return [float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else None for value in values]


def skipped(log: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the updates of a log that were skipped because of a non-finite gradient."""
    return [entry["update"] for entry in log if entry.get("skipped")]
