"""Health rules, which detect from the logged values alone that a run makes the model worse, and say what to change.

The cause is usually the step size, hardly ever `train.beta`: if Adam's first steps are too large, the policy becomes
worse on the winners than its own past; the anchor test then compares noise, and logits and gradients grow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST = 1e100
"""Values of larger magnitude are treated as non-finite, so that sums and squares of the rest do not overflow."""
WINDOW = 5
"""Number of updates that a rule averages over."""
MOST_CLIPPED = "most_clipped"
"""The key under which `most_clipped` adds a value to a log entry."""
_RISE = 0.03  # limit of (winner's error / reference's error at the winner) - 1
_LOGIT = 1.0  # limit of the mean |logit|
_GROWTH = 8.0  # limit of the gradient norm, as a multiple of the first update's
_KEPT = 0.1  # limit of the share of samples that teach anything
_CLIPPED = 0.5  # limit of the share of clipped ratios in any one step
_LOSS = 0.65  # limit of the preference loss, which is ln 2 = 0.693 where policy and reference agree


@dataclass(frozen=True)
class Rule:
    """One health rule.

    Attributes:
        name: key of the rule's flag in the log: 1 while the rule's condition is met, else 0.
        keys: the logged values that the rule reads; an update in which one is missing or non-finite is ignored.
        holds: returns whether the condition is met, given the run's last `WINDOW` updates that are not ignored and the
            first such update; each is a list of values in the order of `keys`.
        sign: the observation, optionally followed by a colon and its meaning; no final period.
        cure: what to do about it; no final period.
    """

    name: str
    keys: tuple[str, ...]
    holds: Callable[[Sequence[list[float]], list[float]], bool]
    sign: str
    cure: str

    @property
    def warning(self) -> str:
        """The line to print during training."""
        return f"{self.sign} (mean of the last {WINDOW} updates). If this persists, {self.cure}"


def _rises(window: Sequence[list[float]], first: list[float]) -> bool:
    return all(reference > 0 for _, reference in window) and _mean(w / r - 1 for w, r in window) > _RISE


def _loses(window: Sequence[list[float]], first: list[float]) -> bool:
    return _mean(loss for loss, _, _ in window) < _LOSS and _mean(w - r for _, w, r in window) > 0


def _mean(values: Iterable[float]) -> float:
    return sum(values) / WINDOW  # not `statistics.fmean`, which raises if infinities cancel


_ERRORS = ("winner_error", "ref_winner_error")
RULES = (
    Rule(
        "winner_above_reference",
        _ERRORS,
        _rises,
        f"the winner's error is above the reference's by more than {_RISE:.0%}: on the good examples the policy is "
        "worse than its past checkpoints",
        "lower train.learning_rate, or raise train.warmup_updates",
    ),
    Rule(
        "logits_large",
        ("logit_abs", *_ERRORS),
        lambda window, first: _mean(logit for logit, _, _ in window) > _LOGIT,
        f"mean |logit| is above {_LOGIT:g}: the steps are too large for this train.beta",
        "lower train.learning_rate first; train.beta is rarely the cause",
    ),
    Rule(
        "gradient_grown",
        ("grad_norm",),
        lambda window, first: 0 < _GROWTH * first[0] < _mean(norm for (norm,) in window),
        f"|grad| is more than {_GROWTH:g} times that of the first update",
        "lower train.learning_rate, or raise train.warmup_updates",
    ),
    Rule(
        "losers_worse",
        ("preference_loss", *_ERRORS),
        _loses,
        f"the loss is below {_LOSS} while the winner's error is above the reference's: it falls because losers get "
        "worse, not because winners get better",
        "raise train.sft_weight, or set train.safeguard = true if the objective allows it",
    ),
    Rule(
        "little_kept",
        ("kept",),
        lambda window, first: _mean(kept for (kept,) in window) < _KEPT,
        f"less than {_KEPT:.0%} of the samples teach anything: the rewards of a prompt's samples are equal, closer "
        "than rl.gap, or missing",
        "lower sampler.guidance or rl.gap, raise rl.samples_per_prompt, or choose a finer rl.reward",
    ),
    Rule(
        "step_clipped",
        (MOST_CLIPPED,),
        lambda window, first: _mean(share for (share,) in window) > _CLIPPED,
        f"more than {_CLIPPED:.0%} of the ratios are clipped at one of the sampler's steps, usually the second to "
        "last: it outweighs the other steps, then teaches nothing",
        "lower train.learning_rate or train.updates_per_iteration, or leave the step out (rl.window, for grpo)",
    ),
)


@dataclass
class _Seen:
    first: list[float] | None = None
    window: deque[list[float]] = field(default_factory=lambda: deque(maxlen=WINDOW))


class HealthWatch:
    """Applies `RULES` to the updates of a run, in order.

    A spell of a rule begins when its condition is first met over `WINDOW` updates (ignored ones do not count, see
    `Rule.keys`), and ends when the condition is no longer met. The next spell begins at least `WINDOW` updates later,
    so that a value near its limit does not cause one warning after another. Rules that compare with a reference never
    fire if the objective has no reference.
    """

    def __init__(self) -> None:
        self._seen = {rule.name: _Seen() for rule in RULES}
        self._within: set[str] = set()

    def update(self, entry: Mapping[str, Any]) -> list[Rule]:
        """Adds the next update's log entry; returns the rules of which a spell begins with this update."""
        return [rule for rule in RULES if (values := _values(rule, entry)) is not None and self._begins(rule, values)]

    def _begins(self, rule: Rule, values: list[float]) -> bool:
        seen = self._seen[rule.name]
        seen.first = seen.first or values
        seen.window.append(values)
        holds = len(seen.window) == WINDOW and rule.holds(seen.window, seen.first)
        before = rule.name in self._within
        if before and not holds:
            self._within.remove(rule.name)
            seen.window.clear()
        if holds:
            self._within.add(rule.name)
        return holds and not before

    def within(self, rule: Rule) -> bool:
        """Returns whether a spell of the rule has begun and not ended."""
        return rule.name in self._within

    def flags(self, entry: Mapping[str, Any]) -> dict[str, float]:
        """Returns the flags to log: 1 within a spell, else 0. Rules whose keys this update lacks are left out."""
        return {rule.name: float(self.within(rule)) for rule in RULES if all(key in _known(entry) for key in rule.keys)}


def _known(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a log entry with `preference_loss` and `MOST_CLIPPED` filled in.

    Where `preference_loss` is missing, `loss` is used, except for KTO, which alone logs `liked` and whose loss is 0.5,
    not ln 2, where policy and reference agree.
    """
    entry = {**entry, **most_clipped(entry)}
    return {"preference_loss": entry["loss"], **entry} if "loss" in entry and "liked" not in entry else entry


def most_clipped(entry: Mapping[str, Any]) -> dict[str, float]:
    """Returns the largest share of clipped ratios at any step, as `MOST_CLIPPED`; empty where no ratio is clipped.

    The ratios of an iteration's first update are all 1, so it says nothing about the steps.
    """
    shares = [_finite(value) for name, value in entry.items() if name.startswith("clipped_step")]
    most = max((share for share in shares if share is not None), default=0.0)
    return {MOST_CLIPPED: most} if most else {}


def _values(rule: Rule, entry: Mapping[str, Any]) -> list[float] | None:
    known = _known(entry)
    values = [_finite(known.get(key)) for key in rule.keys]
    finite = [value for value in values if value is not None]
    return finite if len(finite) == len(values) else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else None


def intervals(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """Returns the spells of each rule in a log, by rule name, as pairs (first update, last update)."""
    watch, found = HealthWatch(), dict[str, list[tuple[int, int]]]()
    for entry in entries:
        begin = watch.update(entry)
        for rule in RULES:
            if rule in begin:
                found.setdefault(rule.name, []).append((entry["update"], entry["update"]))
            elif watch.within(rule):
                spans = found[rule.name]
                spans[-1] = spans[-1][0], entry["update"]
    return found
