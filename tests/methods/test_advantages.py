"""Advantages against numbers worked out by hand, and against the public rule on a recorded stream."""

import json
import math
import statistics

import numpy as np
import pytest

from seppo_fast.methods.rewards.advantages import PromptStatistics, group_advantages, has_spread

REWARDS = np.array([[1.0, 3.0], [10.0, 10.0], [0.0, 4.0]])


def test_groups_by_their_own_spread():
    # Means 2, 10, 2; deviations 1 and 2; population std 1, 0, 2.
    expected = [[-1 / 1.0001, 1 / 1.0001], [0, 0], [-2 / 2.0001, 2 / 2.0001]]
    np.testing.assert_allclose(group_advantages(REWARDS, spread="group", clip=5), expected, rtol=1e-14)


def test_groups_by_the_spread_of_the_batch():
    # Mean of all 28/6; sum of squares 1 + 9 + 200 + 16 = 226; variance 226/6 - (28/6)^2.
    std = math.sqrt(226 / 6 - (28 / 6) ** 2)
    expected = np.array([[-1, 1], [0, 0], [-2, 2]]) / (std + 1e-4)
    np.testing.assert_allclose(group_advantages(REWARDS, spread="batch", clip=5), expected, rtol=1e-13)


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_group_without_spread_is_exactly_zero(spread):
    """0.1 summed thirteen times and divided is not 0.1, which an epsilon of 1e-4 would not hide."""
    rewards = np.array([[0.1] * 13, [*[0.1] * 12, 0.2]])
    assert has_spread(rewards).tolist() == [False, True]
    advantages = group_advantages(rewards, spread=spread, clip=5)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).all()


def test_advantages_are_clipped():
    rewards = np.array([[0.0] * 99 + [1.0]])
    advantages = group_advantages(rewards, spread="group", clip=5)
    assert advantages.max() == 5 and group_advantages(rewards, spread="group", clip=50).max() > 9


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1.0], [2.0]], "at least 2 samples per prompt"),
        ([1.0, 2.0], r"got \(2,\)"),
        ([[1.0, 2.0], [np.nan, 0.0]], r"1 of 4 are non-finite, the first at \(1, 0\): nan"),
        ([[np.inf, 2.0]], "inf"),
    ],
)
def test_unusable_groups_are_refused(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(np.array(rewards), spread="group", clip=5)


def test_prompts_with_few_rewards_use_the_whole_batch():
    tracked = PromptStatistics(buffer=4, min_count=3)
    first = tracked.advantages(["a", "b", "a"], np.array([1.0, 5.0, 3.0]), clip=5)  # a: 2 rewards, b: 1
    np.testing.assert_allclose(first, (np.array([1, 5, 3]) - 3) / (math.sqrt(8 / 3) + 1e-6), rtol=1e-14)
    second = tracked.advantages(["a", "b"], np.array([5.0, 6.0]), clip=5)  # a now has 1, 3, 5; b has 5, 6
    np.testing.assert_allclose(second, [2 / (math.sqrt(8 / 3) + 1e-6), 0.5 / (0.5 + 1e-6)], rtol=1e-14)
    third = tracked.advantages(["a", "a"], np.array([7.0, 9.0]), clip=1.2)  # the 1 has left: 3, 5, 7, 9
    np.testing.assert_allclose(third, [1 / (math.sqrt(5) + 1e-6), 1.2], rtol=1e-14)


def stream(batches):
    rng = np.random.default_rng(5)
    for _ in range(batches):
        prompts = [f"prompt {rng.integers(6)}" for _ in range(16)]
        yield prompts, rng.normal(20.0, 2.0, 16)


def test_the_public_rule_on_a_recorded_stream():
    """Append first, then mean and population std of the last 16, or of the batch below 10 rewards of the prompt."""
    tracked, seen, kinds = PromptStatistics(buffer=16, min_count=10), {}, set()
    for prompts, rewards in stream(20):
        for prompt, reward in zip(prompts, rewards, strict=True):
            seen.setdefault(prompt, []).append(float(reward))
        expected = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            known = seen[prompt][-16:] if len(seen[prompt]) >= 10 else rewards.tolist()
            kinds.add((len(seen[prompt]) >= 10, len(seen[prompt]) > 16))
            expected.append((reward - statistics.fmean(known)) / (statistics.pstdev(known) + 1e-6))
        np.testing.assert_allclose(tracked.advantages(prompts, rewards, clip=100), expected, rtol=1e-11)
    assert kinds == {(False, False), (True, False), (True, True)}


def test_statistics_continue_from_json():
    whole, half = (PromptStatistics(buffer=8, min_count=4) for _ in range(2))
    batches = list(stream(6))
    for prompts, rewards in batches[:3]:
        whole.advantages(prompts, rewards, clip=5)
        half.advantages(prompts, rewards, clip=5)
    resumed = PromptStatistics(buffer=8, min_count=4)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for prompts, rewards in batches[3:]:
        expected = whole.advantages(prompts, rewards, clip=5)
        assert np.array_equal(resumed.advantages(prompts, rewards, clip=5), expected)
    assert resumed.state_dict() == whole.state_dict() and max(map(len, whole.state_dict()["rewards"].values())) == 8
    with pytest.raises(ValueError, match=r"'buffer': 8.*'buffer': 9"):
        PromptStatistics(buffer=9, min_count=4).load_state_dict(half.state_dict())


def test_unusable_rewards_are_refused_and_change_nothing():
    tracked = PromptStatistics(buffer=4, min_count=2)
    with pytest.raises(ValueError, match="non-finite"):
        tracked.advantages(["a", "b"], np.array([1.0, np.nan]), clip=5)
    with pytest.raises(ValueError, match=r"\(2,\), at least one; got \(3,\)"):
        tracked.advantages(["a", "b"], np.zeros(3), clip=5)
    assert tracked.state_dict()["rewards"] == {}
    with pytest.raises(ValueError, match="min_count: expected from 1 to buffer = 4, got 5"):
        PromptStatistics(buffer=4, min_count=5)
