"""Agreement coefficients against published worked examples and pair-by-pair references."""

import itertools
import math

import numpy as np
import pytest

from seppo_fast.evaluation.human.agreement import fleiss_kappa, krippendorff_alpha, pairwise_agreement

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability": data C, four observers, 12 units; 0: no answer.
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]
# The same paper: data A (two observers, binary) and B (two observers, five values).
BINARY = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
FIVE_VALUES = ["aabbdcccedda", "babbbccceddd"]
# The worked example of en.wikipedia.org/wiki/Fleiss'_kappa: 10 subjects, 14 raters, 5 categories.
FOURTEEN_RATERS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def from_counts(counts):
    return np.array([np.repeat(np.arange(len(row)), row) for row in counts])


def pairs(row):
    given = [value for value in row if value >= 0]
    return list(itertools.permutations(given, 2)), len(given)


def alpha_by_pairs(ratings):
    """1 - D_observed / D_expected, summed over ordered pairs of values."""
    units = [pairs(row) for row in ratings if sum(value >= 0 for value in row) > 1]
    values = [value for row in ratings if sum(v >= 0 for v in row) > 1 for value in row if value >= 0]
    observed = sum(sum(a != b for a, b in found) / (size - 1) for found, size in units) / len(values)
    every = list(itertools.permutations(values, 2))
    return 1 - observed / (sum(a != b for a, b in every) / len(every))


def kappa_by_pairs(ratings):
    observed = np.mean([np.mean([a == b for a, b in pairs(row)[0]]) for row in ratings])
    shares = [np.mean(np.asarray(ratings) == value) for value in np.unique(ratings)]
    expected = sum(share**2 for share in shares)
    return (observed - expected) / (1 - expected)


def test_alpha_of_the_published_examples():
    assert krippendorff_alpha(np.array(FOUR_OBSERVERS).T - 1) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(np.array(BINARY).T) == pytest.approx(0.095, abs=5e-4)
    letters = np.array([[ord(letter) - ord("a") for letter in row] for row in FIVE_VALUES]).T
    assert krippendorff_alpha(letters) == pytest.approx(0.692, abs=5e-4)


def test_kappa_of_the_published_example():
    ratings = from_counts(FOURTEEN_RATERS)
    assert fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)
    assert pairwise_agreement(ratings) == pytest.approx(0.378, abs=5e-4)


@pytest.mark.parametrize("seed", range(6))
def test_coefficients_against_sums_over_pairs(seed):
    rng = np.random.default_rng(seed)
    ratings = rng.integers(0, 3, (17, 4))
    assert fleiss_kappa(ratings) == pytest.approx(kappa_by_pairs(ratings), rel=1e-12)
    missing = np.where(rng.random(ratings.shape) < 0.4, -1, ratings)
    assert krippendorff_alpha(missing) == pytest.approx(alpha_by_pairs(missing), rel=1e-12)
    every = [a == b for row in missing for a, b in pairs(row)[0]]
    assert pairwise_agreement(missing) == pytest.approx(np.mean(every), rel=1e-12)


def test_chance_gives_zero_and_unanimity_one():
    rng = np.random.default_rng(0)
    ratings = rng.integers(0, 3, (4000, 3))
    assert abs(fleiss_kappa(ratings)) < 0.02 and abs(krippendorff_alpha(ratings)) < 0.02
    same = np.repeat(rng.integers(0, 3, (9, 1)), 5, axis=1)
    assert fleiss_kappa(same) == krippendorff_alpha(same) == pairwise_agreement(same) == 1


@pytest.mark.parametrize(
    "ratings",
    [np.zeros((0, 3), int), np.full((4, 3), -1), np.zeros((4, 1), int), np.array([[0, -1], [-1, 1]])],
)
def test_undefined_without_two_answers_to_an_item(ratings):
    assert all(math.isnan(found(ratings)) for found in (fleiss_kappa, krippendorff_alpha, pairwise_agreement))


def test_undefined_if_all_answers_are_the_same():
    ratings = np.full((5, 3), 2)
    assert math.isnan(fleiss_kappa(ratings)) and math.isnan(krippendorff_alpha(ratings))
    assert pairwise_agreement(ratings) == 1


def test_kappa_needs_complete_answers():
    assert math.isnan(fleiss_kappa([[0, 1, 1], [0, -1, 0]])) and not math.isnan(
        krippendorff_alpha([[0, 1, 1], [0, -1, 0]])
    )


def test_a_wrong_shape():
    for found in (fleiss_kappa, krippendorff_alpha, pairwise_agreement):
        with pytest.raises(ValueError, match="expected .items, raters., got shape"):
            found([0, 1])
