"""Intervals, rates, tests and correlations against published values and independent formulas."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from seppo_fast.evaluation.statistics import (
    bootstrap,
    cluster,
    holm,
    sign_flip,
    spearman,
    t_quantile,
    wilson,
    win_rate,
)


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995])
def test_t_quantiles_against_scipy(probability):
    freedoms = [*range(1, 64), 99, 100, 149, 999, 3199, 10_000, 10_001, 100_000, 10**7]
    found = [t_quantile(probability, freedom) for freedom in freedoms]
    assert found == pytest.approx(scipy.stats.t.ppf(probability, freedoms), rel=1e-10)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("probability", "freedom"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_t_quantiles_refuse_what_is_out_of_range(probability, freedom):
    with pytest.raises(ValueError, match="probability, freedom"):
        t_quantile(probability, freedom)


@pytest.mark.parametrize(
    ("wins", "n", "published"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (1, 10, (0.0179, 0.4042))],
)
def test_wilson_against_published_values(wins, n, published):
    assert wilson(wins, n) == pytest.approx(published, abs=5e-5)


def test_wilson_solves_its_equation():
    """The ends are the shares p at which the observed share is z standard errors away."""
    z = 1.959963984540054
    for wins, n in ((3, 7), (11, 13), (1.5, 9)):
        for p in wilson(wins, n):
            assert abs(wins / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))
    assert wilson(3, 7, 0.5)[0] > wilson(3, 7)[0]
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("wins", "n", "confidence"), [(-1, 3, 0.95), (4, 3, 0.95), (1, 3, 1.0), (1, 3, 0.0)])
def test_wilson_refuses_what_is_out_of_range(wins, n, confidence):
    with pytest.raises(ValueError, match="wins, n, confidence"):
        wilson(wins, n, confidence)


def test_ties_are_counted_apart_and_half_in_the_rate():
    found = win_rate([0.5, 0.0, -0.1, 0.25, 0.0, np.nan, -0.0])
    assert (found.wins, found.ties, found.losses) == (2, 3, 1)
    assert found.rate == pytest.approx((2 + 1.5) / 6)
    assert (found.low, found.high) == wilson(2, 3)
    all_ties = win_rate([0.0, 0.0])
    assert (all_ties.ties, all_ties.rate) == (2, 0.5) and (all_ties.low, all_ties.high) == (0.0, 1.0)
    one = win_rate([3.0])
    assert (one.wins, one.rate) == (1, 1.0) and (one.low, one.high) == pytest.approx((0.2065, 1.0), abs=5e-5)
    with pytest.raises(ValueError, match="none of them is finite"):
        win_rate([np.nan])


def test_bootstrap_of_a_binomial_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        low, high = bootstrap(rng.binomial(1, 0.3, 80).astype(float), draws=500, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.91 < covered / 400 < 0.98


def test_bootstrap_repeats_and_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(2.0, 3.0, 901)
    low, high = bootstrap(values)
    assert (low, high) == bootstrap(values) != bootstrap(values, seed=1)
    half = 1.96 * values.std(ddof=1) / math.sqrt(901)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap([1.5]) == (1.5, 1.5)
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, np.nan])
    with pytest.raises(ValueError, match="finite"):
        bootstrap([])


def test_sign_flip_goes_through_all_signs_of_few_differences():
    values = [0.3, -0.1, 0.7, 0.2, 0.0]
    sums = [abs(sum(s * v for s, v in zip(signs, values[:4]))) for signs in itertools.product((1, -1), repeat=4)]
    assert sign_flip(values) == np.mean([total >= abs(sum(values)) - 1e-12 for total in sums])
    assert sign_flip([0.0, 0.0]) == 1.0 and sign_flip([5.0]) == 1.0
    assert sign_flip([0.1] * 8) == 2 / 2**8


def test_sign_flip_of_many_differences():
    rng = np.random.default_rng(2)
    assert sign_flip(np.full(100, 0.1)) == pytest.approx(1 / 10_001)
    values = rng.normal(0.15, 1.0, 300)
    z = values.sum() / math.sqrt((values**2).sum())  # under flips the sum is nearly normal with this variance
    assert sign_flip(values) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.015)
    assert sign_flip(values) == sign_flip(-values)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
    with pytest.raises(ValueError, match="p_values"):
        holm([1.2])


def test_spearman_by_hand():
    x, y = [3.0, 1.0, 2.0, 5.0, 9.0], [30.0, 1.0, 8.0, 9.0, 99.0]
    d = np.array([3, 1, 2, 4, 5]) - np.array([4, 1, 2, 3, 5])
    assert spearman(x, y) == pytest.approx(1 - 6 * (d**2).sum() / (5 * 24))  # the formula for untied ranks
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert spearman([*x, np.nan], [*y, 0.0]) == spearman(x, y)
    assert math.isnan(spearman([1.0], [2.0])) and math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="equally long"):
        spearman([1.0], [1.0, 2.0])


def test_prompts_are_clustered_in_sorted_order():
    found = cluster(["b", "a\0", "b", "a"], [1.0, 2.0, 0.0, np.nan])
    assert np.isnan(found[0]) and found[1:].tolist() == [2.0, 0.5]
