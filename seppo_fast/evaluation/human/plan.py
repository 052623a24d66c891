"""Draws a study: which items are shown, and for each rater in which order, on which side, with which checks.

All draws are a pure function of (seed, digest of `items.json`). Raters do not have that digest, so they cannot compute
the sides from the public code and a guessed seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from seppo_fast.evaluation.media.items import Item
from seppo_fast.utils.random import keyed_rng

Kind = Literal["pair", "repeat", "noise", "mismatch"]
CHECK_SHARE, LEAST_CHECKS = 0.08, 4
REPEAT_SHARE, LEAST_REPEATS = 0.08, 4


@dataclass(frozen=True)
class Shown:
    """One medium of a trial.

    Attributes:
        item: the id of the item it belongs to.
        model: the model that generated it.
        noise: whether heavy noise is blended over it.
    """

    item: str
    model: str
    noise: bool = False


@dataclass(frozen=True)
class Trial:
    """Two media that a rater compares for one prompt.

    Attributes:
        kind: `pair`: one medium of each model; `repeat`: an earlier pair with its sides swapped; `noise`: an attention
            check against the same medium under heavy noise; `mismatch`: one against another prompt's medium.
        item: the id of the item whose prompt is shown.
        left: the medium on the left.
        right: the medium on the right.
        good: the side of the obvious winner of an attention check; empty for pairs and repeats.
    """

    kind: Kind
    item: str
    left: Shown
    right: Shown
    good: Literal["", "left", "right"] = ""

    @property
    def swapped(self) -> Trial:
        """The repeat of a pair."""
        return Trial("repeat", self.item, self.right, self.left)


def choose(items: Sequence[Item], count: int, seed: int, secret: str) -> list[Item]:
    """Returns a random subset of `count` items that uses every prompt before it uses one twice.

    Raises:
        ValueError: `count` is not between 1 and the number of items.
    """
    if not 1 <= count <= len(items):
        raise ValueError(f"count must be from 1 to {len(items)}, got {count}")
    order = keyed_rng(seed, f"human subset {secret}").permutation(len(items))
    used: Counter[str] = Counter()
    rounds: list[tuple[int, int, int]] = []
    for place in order:
        rounds.append((used[items[place].prompt], len(rounds), int(place)))
        used[items[place].prompt] += 1
    return [items[place] for _, _, place in sorted(rounds)[:count]]


def trials(
    chosen: Sequence[Item],
    spare: Sequence[Item],
    models: tuple[str, str],
    rater: int,
    seed: int,
    secret: str,
    *,
    mismatches: bool,
) -> list[Trial]:
    """Returns one rater's trials in order: all pairs, attention checks, and repeats near the end.

    The first model is on the left in half of the pairs, and the obvious winner in half of the checks. Pairs to repeat
    are drawn from the first half of the pairs and repeated in the last quarter of the order.

    Args:
        chosen: the items of the study, the same for all raters.
        spare: other items, from which attention checks are made; if empty, they are made from `chosen`.
        models: the two models.
        rater: the rater's number.
        seed: the study's seed.
        secret: the digest of `items.json`.
        mismatches: whether every second attention check shows another prompt's medium, where such a prompt exists.
    """
    rng = keyed_rng(seed, f"human trials {secret}", rater)
    pairs = []
    for item, first_left in zip(chosen, _halves(len(chosen), rng)):
        left, right = models if first_left else models[::-1]
        pairs.append(Trial("pair", item.id, Shown(item.id, left), Shown(item.id, right)))
    order = pairs + _checks(chosen, spare, models, rng, mismatches)
    order = [order[place] for place in rng.permutation(len(order))]
    early = [trial for trial in order if trial.kind == "pair"][: (len(chosen) + 1) // 2]
    count = min(len(early), max(LEAST_REPEATS, round(REPEAT_SHARE * len(chosen))))
    last_quarter = len(order) - len(order) // 4
    for place in rng.choice(len(early), count, replace=False):
        start = max(last_quarter, order.index(early[place]) + 1)
        order.insert(int(rng.integers(start, len(order) + 1)), early[place].swapped)
    return order


def _checks(
    chosen: Sequence[Item],
    spare: Sequence[Item],
    models: tuple[str, str],
    rng: np.random.Generator,
    mismatches: bool,
) -> list[Trial]:
    count = max(LEAST_CHECKS, round(CHECK_SHARE * len(chosen)))
    source = spare or chosen
    order = [int(place) for place in rng.permutation(len(source))]
    sides, by_first = _halves(count, rng), _halves(count, rng)
    found = []
    kind: Kind
    for number in range(count):
        item, model = source[order[number % len(source)]], models[0 if by_first[number] else 1]
        good, bad, kind = Shown(item.id, model), Shown(item.id, model, noise=True), "noise"
        if mismatches and number % 2 and (other := _unlike(item, [*spare, *chosen], rng)):
            bad, kind = Shown(other.id, model), "mismatch"
        found.append(
            Trial(kind, item.id, good, bad, "left") if sides[number] else Trial(kind, item.id, bad, good, "right")
        )
    return found


def _unlike(item: Item, items: Sequence[Item], rng: np.random.Generator) -> Item | None:
    """Returns one of the items whose prompts share the fewest words with this one's; None if all share all words."""
    words = set(item.prompt.lower().split())

    def overlap(other: Item) -> float:
        others = set(other.prompt.lower().split())
        return len(words & others) / max(1, len(words | others))

    overlaps = [overlap(other) for other in items]
    least = min(overlaps)
    if least == 1:
        return None
    return items[int(rng.choice(np.flatnonzero(np.asarray(overlaps) == least)))]


def _halves(count: int, rng: np.random.Generator) -> list[bool]:
    """Returns `count` booleans in random order of which half are true; of an odd number, one half by a coin."""
    extra = int(rng.integers(2)) if count % 2 else 0
    return [bool(place < count // 2 + extra) for place in rng.permutation(count)]
