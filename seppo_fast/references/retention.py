"""Which past policies a bounded pool keeps. Checkpoint 0 always stays."""

from __future__ import annotations

from collections.abc import Sequence

from seppo_fast.config.vocabulary import KeepRule
from seppo_fast.utils.random import keyed_rng


def evict(rule: KeepRule, kept: Sequence[int], number: int, keep: int, seed: int) -> int | None:
    """The checkpoint that goes when `number` comes: one of those kept, `number` itself, or None while there is room.

    Args:
        rule: `newest` keeps the last ones; `spread` those of ages as even as can be; `reservoir` every past policy but
            the initial one with the same probability (Vitter's algorithm R), so that draws from the pool stay draws
            from all of them.
        kept: numbers, ascending, with 0 among them unless it is still to come.
        number: of the checkpoints so far.
        keep: how many stay, checkpoint 0 included; at least 2.
        seed: of the reservoir, a function of (seed, number).
    """
    assert keep >= 2
    if len(kept) < keep:
        return None
    others = kept[1:]
    if rule == "newest":
        return others[0]
    if rule == "spread":
        around = [*kept, number]
        # Of the oldest that leaves the smallest gap.
        return min(others, key=lambda one: around[around.index(one) + 1] - around[around.index(one) - 1])
    place = int(keyed_rng(seed, "reservoir", number).integers(number))
    return others[place] if place < len(others) else number
