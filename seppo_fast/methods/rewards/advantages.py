"""Advantages: by how much the reward of a sample exceeds what its prompt usually gets, in standard deviations.

All of this is float64 on the host, and standard deviations are those of a population (divided by n). With several
processes, every process must see the rewards of all, in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

ADVANTAGE_CLIP = 5.0
"""The largest advantage by absolute value, as published for DDPO, Flow-GRPO and DiffusionNFT alike."""
_GROUP_EPSILON = 1e-4  # Flow-GRPO's
_PROMPT_EPSILON = 1e-6  # DDPO's


def has_spread(rewards: np.ndarray) -> np.ndarray:
    """Returns whether the rewards of a group differ: `(P,)` bool for rewards `(P, K)`.

    A group whose rewards are all the same has advantages of 0 and teaches nothing, so it can be left out.
    """
    return np.asarray(rewards.max(1) > rewards.min(1))


def group_advantages(rewards: np.ndarray, *, spread: Literal["group", "batch"], clip: float) -> np.ndarray:
    """Computes `(r - mean of the group) / (std + 1e-4)`, clipped (GRPO, as in Flow-GRPO's code).

    Args:
        rewards: `(P, K)` rewards of K samples for each of P prompts.
        spread: whether std is that of the sample's own `group`, or of the whole `batch`, Flow-GRPO's default.
        clip: the largest advantage, by absolute value.

    Returns:
        `(P, K)` float64; exactly 0 in groups without spread.

    Raises:
        ValueError: The shape is wrong, a group has a single sample, or a reward is non-finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards: expected (prompts, samples per prompt) with at least 2 samples per prompt, got {rewards.shape}: "
            "the advantage of a single sample over its own mean is always 0"
        )
    _refuse_non_finite(rewards)
    deviation = rewards - rewards.mean(1, keepdims=True)
    deviation[~has_spread(rewards)] = 0.0  # the mean of equal numbers may be rounded
    std = rewards.std(1, keepdims=True) if spread == "group" else rewards.std()
    return np.clip(deviation / (std + _GROUP_EPSILON), -clip, clip)


class PromptStatistics:
    """Advantages by the latest rewards of each prompt: DDPO's rule, with one queue of rewards per prompt.

    The queues are part of a run's state: see `state_dict`.

    Args:
        buffer: the number of rewards kept per prompt.
        min_count: the number of rewards that a prompt needs for statistics of its own; until then, those of the whole
            batch are used.

    Raises:
        ValueError: A number is below 1, or `min_count` can never be reached.
    """

    def __init__(self, buffer: int, min_count: int) -> None:
        if not 1 <= min_count <= buffer:
            raise ValueError(f"min_count: expected from 1 to buffer = {buffer}, got {min_count}")
        self._buffer = buffer
        self._min_count = min_count
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: np.ndarray, *, clip: float) -> np.ndarray:
        """Adds a batch of rewards to the queues, and returns the batch's advantages.

        They are `(r - mean) / (std + 1e-6)`, clipped, with mean and std of the prompt's queue, the batch included, and
        exactly 0 if all of these rewards are the same.

        Args:
            prompts: N prompts, in any order and number of repetitions.
            rewards: `(N,)` their rewards.
            clip: the largest advantage, by absolute value.

        Returns:
            `(N,)` float64.

        Raises:
            ValueError: The shape is wrong, or a reward is non-finite. The queues are then unchanged.
        """
        rewards = np.asarray(rewards, dtype=np.float64)
        if rewards.shape != (len(prompts),) or not len(prompts):
            raise ValueError(f"rewards: expected one per prompt, ({len(prompts)},), at least one; got {rewards.shape}")
        _refuse_non_finite(rewards)
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(row)
        advantages = np.zeros_like(rewards)
        for prompt, own in rows.items():
            queue = self._rewards.setdefault(prompt, deque(maxlen=self._buffer))
            queue.extend(rewards[own].tolist())
            known = rewards if len(queue) < self._min_count else np.array(queue)
            if known.max() > known.min():  # the mean of equal numbers may be rounded
                advantages[own] = (rewards[own] - known.mean()) / (known.std() + _PROMPT_EPSILON)
        return np.clip(advantages, -clip, clip)

    def state_dict(self) -> dict[str, Any]:
        """Returns the queues and their sizes as plain numbers, lists and strings, which JSON keeps exactly."""
        return {
            "buffer": self._buffer,
            "min_count": self._min_count,
            "rewards": {prompt: list(queue) for prompt, queue in self._rewards.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the queues with those that `state_dict` returned.

        Raises:
            ValueError: They were made with another `buffer` or `min_count`.
        """
        sizes = {"buffer": self._buffer, "min_count": self._min_count}
        saved = {name: state[name] for name in sizes}
        if saved != sizes:
            raise ValueError(f"the rewards were kept with {saved}, which cannot continue with {sizes}")
        self._rewards = {prompt: deque(kept, maxlen=self._buffer) for prompt, kept in state["rewards"].items()}


def _refuse_non_finite(rewards: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        place = tuple(int(index) for index in bad[0])
        raise ValueError(
            f"rewards: {len(bad)} of {rewards.size} are non-finite, the first at {place}: {rewards[place]}. Every "
            "sample needs a finite reward"
        )
