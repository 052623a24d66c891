"""Fréchet and kernel distances against a matrix square root, closed forms and double sums."""

import warnings

import numpy as np
import pytest
import scipy.linalg

from seppo_fast.evaluation.metrics.frechet import (
    Distance,
    compare,
    frechet,
    frechet_difference,
    frechet_interval,
    real_floor,
    resamples_for,
)
from seppo_fast.evaluation.metrics.kernel import discrepancy, kernel_difference, kernel_distance, kernel_interval
from seppo_fast.utils.random import keyed_rng


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def by_square_root(x: np.ndarray, y: np.ndarray, ddof: int = 1) -> float:
    a, b = (np.atleast_2d(np.cov(rows, rowvar=False, ddof=ddof)) for rows in (x, y))
    root = scipy.linalg.sqrtm(a @ b)
    return float(np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b) - 2 * np.trace(root).real)


def whitened(x: np.ndarray) -> np.ndarray:
    """Returns rows with mean 0 and the identity as covariance."""
    x = x - x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


@pytest.mark.parametrize(("n", "m", "d"), [(50, 71, 7), (300, 40, 33), (9, 2, 1), (35, 34, 33)])
@pytest.mark.parametrize("ddof", [0, 1])
def test_it_equals_the_form_with_a_matrix_square_root(n, m, d, ddof):
    x, y = normal(1, n, d) @ normal(2, d, d), 0.5 + normal(3, m, d) @ normal(4, d, d)
    assert frechet(x, y, ddof) == pytest.approx(by_square_root(x, y, ddof), rel=1e-6)


def test_known_gaussians_in_closed_form():
    """For commuting covariances the distance is |m1 - m2|^2 + the squared differences of the standard deviations."""
    deviations = np.array([1.0, 2.0, 0.5, 0.1, 3.0]), np.array([0.5, 1.0, 2.0, 0.1, 1.0])
    turn = np.linalg.qr(normal(5, 5, 5))[0]
    means = normal(6, 2, 5)
    x, y = (whitened(normal(7 + i, 60, 5)) * s @ turn + mean for i, (s, mean) in enumerate(zip(deviations, means)))
    exact = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet(x, y) == pytest.approx(exact, rel=1e-12)


def test_singular_covariances_in_closed_form():
    """Two samples in orthogonal subspaces: the covariances' product is 0, so the traces add up."""
    x, y = np.zeros((20, 12)), np.zeros((9, 12))
    x[:, :3], y[:, 7:] = normal(1, 20, 3), normal(2, 9, 5)
    exact = np.sum((x.mean(0) - y.mean(0)) ** 2) + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum()
    assert frechet(x, y) == pytest.approx(exact, rel=1e-12)
    shared = normal(3, 15, 12) @ np.diag([1.0] * 4 + [0.0] * 8)
    assert frechet(shared, 3 * shared) == pytest.approx(
        4 * np.sum(shared.mean(0) ** 2) + 4 * shared.var(0, ddof=1).sum(), rel=1e-12
    )


@pytest.mark.parametrize(("n", "d"), [(30, 7), (7, 30), (2, 3)])
def test_symmetry_zero_shift_and_scale(n, d):
    x, y, shift = normal(1, n, d), normal(2, n + 3, d), normal(3, d)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-12)
    assert frechet(x, x[::-1]) == pytest.approx(0, abs=1e-10) and frechet(x, x) >= 0
    assert frechet(x, x + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)
    assert frechet(7 * x, 7 * y) == pytest.approx(49 * frechet(x, y), rel=1e-9)
    centred = x - x.mean(0)
    assert frechet(centred, 5 * centred) == pytest.approx(16 * np.sum(centred**2) / (n - 1), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "d", "bias"), [(150, 400, 409), (150, 768, 980), (150, 2048, 3190), (1000, 400, 80), (4000, 400, 20)]
)
def test_two_samples_of_one_distribution_are_far_apart(n, d, bias):
    """The numbers in docs/metrics.md: draws of a standard normal, whose true distance is 0."""
    assert frechet(normal(n + d, n, d), normal(n + d + 1, n, d)) == pytest.approx(bias, rel=0.03)


def test_the_floor_is_that_of_disjoint_subsets():
    x = normal(1, 41, 3)
    halves = {round(real_floor(x, 20, seed), 12) for seed in range(4)}
    assert len(halves) == 4 and real_floor(x, 20, 0) == real_floor(x, 20, 0)
    # Rows 0, 1, 2, 3 split into pairs in three ways: 01|23, 02|13, 03|12. Subsets that overlap give other distances.
    splits = {round(real_floor(np.arange(4.0)[:, None], 2, seed), 9) for seed in range(30)}
    assert splits == {4.0, 1.0, 2.0}
    with pytest.warns(RuntimeWarning, match="at 20 samples instead of 30"):
        assert real_floor(x, 30, 0) == real_floor(x, 20, 0)
    with pytest.raises(ValueError, match="n, x"):
        real_floor(x[:3], 2, 0)


def test_more_samples_lower_the_floor():
    x = normal(2, 2000, 50)
    floors = [np.mean([real_floor(x, n, seed) for seed in range(5)]) for n in (60, 200, 1000)]
    assert floors[0] > 2 * floors[1] > 4 * floors[2]


@pytest.mark.parametrize(("n", "d", "low", "high"), [(200, 5, 0.75, 1.4), (40, 60, 1.3, 2.2)])
def test_the_interval_has_the_width_of_the_distances_spread(n, d, low, high):
    """With fewer samples than features it is too wide."""
    rng = np.random.default_rng(3)
    values, widths = [], []
    for seed in range(40):
        x, y = rng.standard_normal((n, d)), 0.2 + 1.3 * rng.standard_normal((n - 10, d))
        ends = frechet_interval(x, y, resamples=40, seed=seed)
        values.append(frechet(x, y))
        widths.append((ends[1] - ends[0]) / (2 * 1.959964))
        assert sum(ends) == pytest.approx(2 * values[-1])
    assert low < np.mean(widths) / np.std(values) < high
    with pytest.raises(ValueError, match="resamples"):
        frechet_interval(x, y, resamples=1)


def test_a_difference_between_models_is_narrower_than_their_distances():
    real, base = normal(1, 120, 6), 1 + normal(2, 80, 6)
    other = base - 0.3
    difference, low, high = frechet_difference(real, base, other, resamples=60)
    assert difference == pytest.approx(frechet(real, other) - frechet(real, base))
    assert low < difference < high < 0
    one = frechet_interval(real, base, resamples=60)
    assert high - low < 0.6 * (one[1] - one[0])
    assert frechet_difference(real, base, base, resamples=5) == (0, 0, 0)
    with pytest.raises(ValueError, match="equally many"):
        frechet_difference(real, base, other[:-1])


def test_a_comparison_tells_when_samples_are_too_few():
    real, generated = normal(1, 90, 4), normal(2, 40, 4)
    few = compare(real, generated[:30], resamples=5)
    assert (few.real, few.generated, few.dimensions, few.floor_items) == (90, 30, 4, 30)
    assert "30 samples are few for 4 features (at least 40" in few.warning and few.low < few.value < few.high
    assert few.floor == real_floor(real, 30, 0) and few.floor_others == 60 and "(30 against 60)" in few.warning
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the floor is not silently measured at another size
        assert compare(real, generated, resamples=5).warning == ""
        halves = compare(real[:50], generated, resamples=5)
    assert (halves.floor_items, halves.floor_others) == (25, 25)
    assert Distance(1, 0, 2, 0.5, 10, 10, 100, 39, 4).warning and not Distance(1, 0, 2, 0.5, 10, 10, 40, 100, 4).warning
    assert "(10 against 10, too few: " in Distance(1, 0, 2, 0.5, 10, 10, 100, 39, 4).warning


def test_the_frames_of_a_clip_count_as_one_sample():
    measured = compare(normal(1, 640, 4), normal(2, 480, 4), resamples=2, units=(16, 16), frames=16)
    assert "30 clips of 16 frames are few for 4 features (at least 40" in measured.warning
    assert compare(normal(1, 640, 4), normal(2, 640, 4), resamples=2, units=(16, 16), frames=16).warning == ""


def test_the_floor_has_nearly_the_bias_of_the_distance():
    """Of equal distributions, with four times as many real samples as generated ones."""
    pairs = [(normal(2 * seed, 240, 20), normal(2 * seed + 1, 60, 20)) for seed in range(40)]
    values, floors = ([f(x, y) for x, y in pairs] for f in (frechet, lambda x, y: real_floor(x, len(y), 0)))
    assert np.mean(values) < np.mean(floors) < 1.12 * np.mean(values)


def test_a_single_unit_has_no_interval():
    real, one, other = normal(1, 30, 3), normal(2, 6, 3), normal(3, 6, 3)
    measured = compare(real, one, resamples=5, units=(1, 6))
    assert np.isnan([measured.low, measured.high]).all() and measured.value == frechet(real, one)
    found = frechet_difference(real, one, other, resamples=5, units=(1, 6))
    assert found[0] == frechet(real, other) - frechet(real, one) and np.isnan(found[1:]).all()
    assert np.isnan(kernel_interval(real, one, resamples=5, units=(1, 6))).all()
    assert np.isnan(kernel_difference(real, one, other, resamples=5, units=(1, 6))[1:]).all()


def double_sum(x: np.ndarray, y: np.ndarray, degree: int, p=None, q=None) -> float:
    """Means over pairs of rows of different groups `p` and `q`; without them, each row is its own group."""

    def mean(rows, others, first, second):
        pairs = [(a, b) for a, i in zip(rows, first) for b, j in zip(others, second) if i != j]
        return sum((a @ b / len(a) + 1) ** degree for a, b in pairs) / len(pairs)

    p, q = (list(range(len(x))), list(range(-len(y), 0))) if p is None else (p, q)
    return mean(x, x, p, p) + mean(y, y, q, q) - 2 * mean(x, y, p, q)


@pytest.mark.parametrize("degree", [1, 3])
def test_the_kernel_distance_is_the_double_sum(degree):
    x, y = normal(1, 11, 5), 0.4 + normal(2, 11, 5)
    mean, deviation = kernel_distance(x, y, degree)
    assert mean == pytest.approx(double_sum(x, y, degree), rel=1e-12) and deviation == 0
    # All subsets of three of four rows, by hand: their mean is what many random subsets converge to.
    whole = x[:3]
    rows = [[i for i in range(4) if i != left] for left in range(4)]
    exact = [double_sum(whole, y[:4][chosen], degree) for chosen in rows]
    mean, deviation = kernel_distance(whole, y[:4], degree, subsets=2000, subset_size=3)
    assert mean == pytest.approx(np.mean(exact), abs=4 * np.std(exact) / np.sqrt(2000))
    assert deviation == pytest.approx(np.std(exact), rel=0.1)


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not():
    pairs = [(normal(2 * seed, 15, 40), normal(2 * seed + 1, 15, 40)) for seed in range(300)]
    values = [kernel_distance(x, y)[0] for x, y in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))
    assert min(values) < 0 and np.mean([frechet(x, y) for x, y in pairs[:20]]) > 40


def shifted(seed: int, prompts: int, reals: int, samples: int):
    """Returns real and generated rows of one distribution, in which a prompt shifts the mean, and their prompts."""
    rng = np.random.default_rng(seed)
    means = 2 * rng.standard_normal((prompts, 1, 5))
    sets = [(means + rng.standard_normal((prompts, count, 5))).reshape(-1, 5) for count in (reals, samples)]
    return *sets, tuple(np.repeat(np.arange(prompts), count) for count in (reals, samples))


@pytest.mark.parametrize("samples", [1, 3])
def test_the_kernel_distance_is_unbiased_if_prompts_are_shared(samples):
    """With the linear kernel, and pairs of a prompt included, its expectation for one sample is known."""
    sets = [shifted(seed, 12, 2, samples) for seed in range(600)]
    values = np.array([discrepancy(x, y, 1, groups) for x, y, groups in sets])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    plain = np.array([discrepancy(x, y, 1) for x, y, _ in sets])
    assert plain.mean() < -10 * plain.std() / np.sqrt(len(plain))
    if samples == 1:  # (within - across) (1 / (2 N - 1) - 2 / N), of 4 and 0
        assert plain.mean() == pytest.approx(4 * (1 / 23 - 2 / 12), abs=3 * plain.std() / np.sqrt(len(plain)))


def test_pairs_of_a_group_are_left_out():
    x, y, groups = shifted(1, 7, 2, 3)
    expected = double_sum(x, y, 3, *groups)
    assert discrepancy(x, y, 3, groups) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(x, x[::-1], groups=(groups[0], groups[0][::-1]))[0] == pytest.approx(
        double_sum(x, x[::-1], 3, groups[0], groups[0][::-1]), rel=1e-12
    )
    with pytest.raises(ValueError, match="at least two prompts"):
        discrepancy(x, y[:3], 3, (groups[0], groups[1][:3]))
    with pytest.raises(ValueError, match="groups: expected 14 and 21 numbers"):
        discrepancy(x, y, 3, groups[::-1])


def test_the_interval_of_a_kernel_distance_has_the_width_of_its_spread():
    values, widths = [], []
    for seed in range(40):
        x, y = normal(2 * seed, 60, 5), 1 + normal(2 * seed + 1, 50, 5)
        ends = kernel_interval(x, y, resamples=40, seed=seed)
        values.append(discrepancy(x, y))
        widths.append((ends[1] - ends[0]) / (2 * 1.959964))
    assert 0.7 < np.mean(widths) / np.std(values) < 1.4


def test_subsets_are_a_function_of_the_seed():
    x, y = normal(1, 30, 4), normal(2, 40, 4)
    assert kernel_distance(x, y, subsets=5, subset_size=9) == kernel_distance(x, y, subsets=5, subset_size=9)
    assert kernel_distance(x, y, subsets=5, subset_size=9) != kernel_distance(x, y, subsets=5, subset_size=9, seed=1)
    for wrong in ({"subset_size": 31}, {"subset_size": 1}, {"subsets": 0}):
        with pytest.raises(ValueError, match="subset_size"):
            kernel_distance(x, y, **wrong)


@pytest.mark.parametrize("distance", [frechet, kernel_distance, compare])
def test_wrong_features_are_refused(distance):
    good = normal(1, 5, 3)
    for bad in (good[:, :2], good[:1], good[0], good[None]):
        with pytest.raises(ValueError, match="expected features"):
            distance(good, bad)
    with pytest.raises(ValueError, match="finite"):
        distance(good, np.where(good == good[0, 0], np.nan, good))


# Rows that belong together


def test_rows_of_a_unit_are_drawn_together():
    real, base, other = normal(20, 12, 3), normal(21, 10, 3), normal(22, 10, 3) + 1
    values, differences = [], []
    for number in range(5):
        rng = keyed_rng(3, "bootstrap of a distance", number)
        x, y = (np.repeat(rng.integers(count, size=count), 2) * 2 + np.tile([0, 1], count) for count in (6, 5))
        values.append(by_square_root(real[x], other[y]))
        rng = keyed_rng(3, "bootstrap of a difference", number)
        x, y = (np.repeat(rng.integers(count, size=count), 2) * 2 + np.tile([0, 1], count) for count in (6, 5))
        differences.append(by_square_root(real[x], other[y]) - by_square_root(real[x], base[y]))
    low, high = frechet_interval(real, other, resamples=5, seed=3, units=(2, 2))
    half = 1.959963984540054 * np.std(values, ddof=1)
    centre = by_square_root(real, other)
    assert (low, high) == pytest.approx((centre - half, centre + half), rel=1e-6)
    difference, low, high = frechet_difference(real, base, other, resamples=5, seed=3, units=(2, 2))
    half = 1.959963984540054 * np.std(differences, ddof=1)
    assert (low, high) == pytest.approx((difference - half, difference + half), rel=1e-6)


def test_resamples_of_a_kernel_distance_are_those_of_its_double_sum():
    """Pairs of a row with itself are left out there, too."""
    real, base, other = normal(25, 12, 3), normal(26, 10, 3), normal(27, 10, 3) + 1
    assert discrepancy(real, other, 2) == pytest.approx(double_sum(real, other, 2), rel=1e-12)
    values, differences = [], []
    for number in range(4):
        rng = keyed_rng(4, "bootstrap of a kernel distance", number)
        x, y = (np.repeat(rng.integers(count, size=count), 2) * 2 + np.tile([0, 1], count) for count in (6, 5))
        values.append(double_sum(real[x], other[y], 2, x, y - 100))
        rng = keyed_rng(4, "bootstrap of a kernel difference", number)
        x, y = (np.repeat(rng.integers(count, size=count), 2) * 2 + np.tile([0, 1], count) for count in (6, 5))
        differences.append(double_sum(real[x], other[y], 2, x, y - 100) - double_sum(real[x], base[y], 2, x, y - 100))
    half = 1.959963984540054 * np.std(values, ddof=1)
    centre = double_sum(real, other, 2)
    found = kernel_interval(real, other, 2, resamples=4, seed=4, units=(2, 2))
    assert found == pytest.approx((centre - half, centre + half), rel=1e-9)
    half = 1.959963984540054 * np.std(differences, ddof=1)
    centre -= double_sum(real, base, 2)
    found = kernel_difference(real, base, other, 2, resamples=4, seed=4, units=(2, 2))
    assert found == pytest.approx((centre, centre - half, centre + half), rel=1e-9)
    with pytest.raises(ValueError, match="equally many rows"):
        kernel_difference(real, base, other[:8])


def test_a_floor_keeps_units_whole():
    x = normal(23, 14, 3)
    order = keyed_rng(4, "real floor").permutation(7)
    halves = [np.concatenate([x[2 * unit : 2 * unit + 2] for unit in units]) for units in (order[:2], order[2:])]
    assert real_floor(x, 5, 4, unit=2) == pytest.approx(by_square_root(*halves), rel=1e-6)
    with pytest.warns(RuntimeWarning, match="at 6 samples instead of 8"):
        real_floor(x, 8, 4, unit=2)
    measured = compare(x, normal(24, 6, 3), resamples=2, units=(2, 3))
    assert (measured.floor_items, measured.real, measured.generated) == (6, 14, 6)
    with pytest.raises(ValueError, match="14 rows cannot be divided into units of 4"):
        frechet_interval(x, x, units=(1, 4))


@pytest.mark.parametrize(
    ("real", "generated", "dimensions", "number"),
    [(600, 600, 25, 100), (150, 150, 2048, 100), (5000, 3200, 512, 100), (700, 700, 2048, 39), (5000, 3200, 2048, 20)],
)
def test_large_sets_get_fewer_bootstrap_samples(real, generated, dimensions, number):
    assert resamples_for(real, generated, dimensions) == number
