"""The remarks on a run's health at the top of a report: warnings with what to change, and a note on the anchor test."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from seppo_fast.commands.panels import Spells, numbers
from seppo_fast.runs.watch import RULES, WINDOW

_UNTIED = ("untied_pairs", "untied_difference", "untied_difference_sd")
_OF_NORMAL = 1.96  # standard errors; 95 % of a normal distribution are within them


def warnings(found: Spells) -> Iterator[str]:
    """Yields a box for each health rule that fired, with its updates and what to change."""
    for rule in RULES:
        if rule.name not in found:
            continue
        when = ", ".join(f"{first} to {last}" if last > first else f"{first}" for first, last in found[rule.name])
        sign, colon, why = rule.sign.partition(": ")
        yield (
            f'<p class="warning"><strong>{escape(_capital(sign))}</strong>{colon}{_marked(why)} (mean of {WINDOW} '
            f"updates; updates {when}, shaded below). {_marked(_capital(rule.cure))}.</p>"
        )


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def _marked(text: str) -> str:
    return re.sub(r"\b(train|rl|sampler)\.\w+( = \w+)?", lambda key: f"<code>{key[0]}</code>", escape(text))


def notes(log: Sequence[Mapping[str, Any]], updates_per_iteration: int | None) -> Iterator[str]:
    """Yields a box if the mean D_w cannot be distinguished from zero in most iterations after the first.

    The first iteration does not count: policy and reference begin with equal weights.

    Args:
        log: the updates of a run.
        updates_per_iteration: the length of an iteration; None: it is unknown, and nothing is yielded. Nor is anything
            for a run whose signs are a scorer's.
    """
    if updates_per_iteration is None or any("judge_skipped" in entry for entry in log):
        return
    verdicts = {number: verdict for number, verdict in _near_chance(log, updates_per_iteration) if number > 1}
    near = [str(number) for number, verdict in verdicts.items() if verdict]
    if 2 * len(near) > len(verdicts):
        yield (
            '<p class="note"><strong>The anchor test decides near chance in this run</strong>; see '
            f"<code>benchmarks.anchor</code>. In {len(near)} of {len(verdicts)} iterations after the first (iterations "
            f"{', '.join(near)}) the mean of the winner's error minus the reference's, without exact ties, cannot be "
            f"distinguished from zero (it is below {_OF_NORMAL} standard errors).</p>"
        )


def _near_chance(log: Sequence[Mapping[str, Any]], updates_per_iteration: int) -> Iterator[tuple[int, bool]]:
    """Yields the number of each iteration, from 1, and whether |mean D_w| is below 1.96 standard errors in it.

    Iterations with fewer than two untied pairs are omitted. The updates' means and standard deviations are pooled by
    sums; updates without a finite mean do not count.
    """
    of_iteration: dict[int, list[Mapping[str, Any]]] = {}
    for entry in log:
        of_iteration.setdefault((entry["update"] - 1) // updates_per_iteration + 1, []).append(entry)
    for number, entries in of_iteration.items():
        pairs = total = squares = 0.0
        for entry in entries:
            count, mean, deviation = ([*numbers([entry], name), None][0] for name in _UNTIED)
            if not count or mean is None or (deviation is None and count > 1):
                continue
            pairs += count
            total += count * mean
            squares += (count - 1) * (deviation or 0.0) ** 2 + count * mean * mean
        if pairs > 1:
            variance = max(squares - total * total / pairs, 0.0) / (pairs - 1)
            yield number, abs(total / pairs) < _OF_NORMAL * math.sqrt(variance / pairs)
