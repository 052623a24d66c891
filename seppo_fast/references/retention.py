"""The rules that decide which past policies a bounded pool keeps. Checkpoint 0 always stays."""

from __future__ import annotations

from collections.abc import Sequence

from seppo_fast.config.vocabulary import KeepRule
from seppo_fast.utils.random import keyed_rng


def evict(rule: KeepRule, kept: Sequence[int], number: int, keep: int, seed: int) -> int | None:
    """Returns the checkpoint to evict when checkpoint `number` is added: a kept one, `number` itself, or None.

    None means that there is still room.

    Args:
        rule: `newest` keeps the last ones; `spread` keeps ones that are spaced as evenly as possible; `reservoir` keeps
            each past policy except the initial one with the same probability (Vitter's algorithm R), so that draws from
            the pool are still draws from all of them.
        kept: the numbers of the kept checkpoints, ascending and starting with 0, or empty if 0 is being added.
        number: the number of the new checkpoint, which equals the count so far.
        keep: how many stay, checkpoint 0 included; at least 2.
        seed: the reservoir's seed; its choice is a function of (seed, number).
    """
    assert keep >= 2
    if len(kept) < keep:
        return None
    others = kept[1:]
    if rule == "newest":
        return others[0]
    if rule == "spread":
        around = [*kept, number]
        # The one whose removal leaves the smallest gap; of several, the oldest.
        return min(others, key=lambda one: around[around.index(one) + 1] - around[around.index(one) - 1])
    place = int(keyed_rng(seed, "reservoir", number).integers(number))
    return others[place] if place < len(others) else number
