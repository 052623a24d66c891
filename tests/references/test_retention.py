"""The past policies that bounded pools keep."""

import collections
import itertools
from types import SimpleNamespace

import pytest

import seppo_fast.references.retention as retention
from seppo_fast.references.retention import evict

RULES = ("newest", "spread", "reservoir")


def kept_of(rule, count, keep, seed=0):
    """Yields the kept checkpoints after each of `count` additions."""
    kept = []
    for number in range(count):
        goes = evict(rule, kept, number, keep, seed)
        kept = [one for one in (*kept, number) if one != goes]
        yield kept


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [2, 3, 4, 7])
def test_a_pool_fills_up_then_holds_its_number_with_the_initial_policy_always_among_them(rule, keep):
    for count, kept in enumerate(kept_of(rule, 60, keep), 1):
        assert len(kept) == min(count, keep)
        assert kept[0] == 0 and kept == sorted(set(kept)) and kept[-1] < count


def test_newest_keeps_the_last_ones():
    for count, kept in enumerate(kept_of("newest", 30, 4), 1):
        assert kept == sorted({0, *range(max(0, count - 3), count)})


@pytest.mark.parametrize("keep", range(2, 14))
def test_spread_stays_spread(keep):
    """Bounds that can be proved for every moment.

    Before a checkpoint is evicted there are `keep` gaps, hence `keep // 2` disjoint pairs of neighbouring gaps, whose
    lengths add up to at most the newest number. So the shortest pair, which becomes one gap, is at most their mean.
    And as it is the shortest pair, none of the remaining pairs is shorter than the new gap nor, by induction, than any
    gap made before: two neighbouring gaps together are never shorter than the longest gap.
    """
    for kept in kept_of("spread", 500, keep):
        gaps = [after - before for before, after in itertools.pairwise(kept)]
        assert max(gaps, default=0) <= max(1, kept[-1] // (keep // 2))
        assert all(sum(pair) >= max(gaps) for pair in itertools.pairwise(gaps))


def test_spread_always_holds_the_newest():
    assert all(kept[-1] == number for number, kept in enumerate(kept_of("spread", 300, 5)))


def test_the_reservoir_makes_every_subset_equally_likely(monkeypatch):
    """Exact, by going through all the numbers that its generator can return."""
    keep, count = 4, 8
    ways = itertools.product(*(range(number) for number in range(keep, count)))
    subsets = collections.Counter()
    for places in ways:
        given = dict(zip(range(keep, count), places, strict=True))

        def rng(seed, purpose, number, given=given):
            def integers(high):
                assert high == number
                return given[number]

            return SimpleNamespace(integers=integers)

        monkeypatch.setattr(retention, "keyed_rng", rng)
        *_, kept = kept_of("reservoir", count, keep)
        subsets[tuple(kept)] += 1
    assert len(subsets) == 35  # three of the seven that came after checkpoint 0
    assert set(subsets.values()) == {4 * 5 * 6 * 7 // 35}


def test_the_reservoir_keeps_every_past_policy_equally_often():
    """Each seed keeps 4 of 11, so per seed counts have variance p (1 - p) and covariance -p (1 - p) / 10."""
    seeds, others, keep = 3000, 11, 4
    counts = collections.Counter()
    for seed in range(seeds):
        *_, kept = kept_of("reservoir", others + 1, keep + 1, seed)
        counts.update(kept[1:])
    share = keep / others
    scale = seeds * share * (1 - share) * others / (others - 1)
    statistic = sum((counts[one] - seeds * share) ** 2 for one in range(1, others + 1)) / scale
    assert statistic < 29.6  # p = 0.001 with 10 degrees of freedom


def test_the_reservoir_is_a_function_of_seed_and_number():
    runs = [list(kept_of("reservoir", 40, 5, seed)) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
