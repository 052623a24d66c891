"""What all methods that learn from a reward share: an iteration's samples, their rewards, and what these teach.

Each iteration begins with the newest past policy, which is the policy itself at that moment unless the pool is full. It
samples for all updates of the iteration at once. Rewards are compared within the iteration, over all processes.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.methods.generation import Keys
from seppo_fast.methods.method import Batch, Method
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.rewards.advantages import ADVANTAGE_CLIP, group_advantages, has_spread
from seppo_fast.methods.rewards.scoring import LatentScorer

Groups = Mapping[tuple[int, int], np.ndarray]
"""Numbers `(K,)` of each prompt, usually one per sample, by (update, position in the update), over all processes."""


@dataclass(frozen=True)
class Iteration:
    """What the newest past policy sampled for the updates of an iteration; this process's share.

    Attributes:
        keys: the samples' keys, update by update; see `Generation`.
        samples: `(len(keys), ...)` float32 on the CPU.
        advantages: `(len(keys),)` float64, NaN for samples to leave out. SPO has several numbers per sample.
        counts: by update, the number of advantages over all processes that are not NaN.
    """

    keys: Keys
    samples: Tensor
    advantages: np.ndarray
    counts: Mapping[int, int]

    def kept(self, update: int) -> list[int]:
        """Returns the rows of an update's samples from which there is something to learn."""
        return [row for row, key in enumerate(self.keys) if key[0] == update and not np.isnan(self.advantages[row])]

    def spare(self, update: int) -> int:
        """Returns the row of any sample of an update."""
        return next(row for row, key in enumerate(self.keys) if key[0] == update)


class RewardMethod(Method):
    """Base class of methods that learn from a reward; see the module docstring.

    Attributes:
        offload_context: entered while a past policy is resident, to free device memory that only the learner needs.

    Args:
        parts: the run's parts.
    """

    def __init__(self, parts: MethodParts) -> None:
        assert parts.judge is not None, "set_up must have loaded rl.reward by now"
        self._config: Config = parts.config
        self._parts = parts
        self._maker = parts.pair_maker()
        self._generation = parts.generation()
        without = "prompts with a sample that has no score are left out, see unscored in the log"
        self._score = LatentScorer(parts.judge, "rl.reward", without, parts.family)
        self._sign = 1.0 if parts.judge.higher_is_better else -1.0
        self._aside = torch.device("cpu") if parts.config.reference.park else None
        self.offload_context: Callable[[], AbstractContextManager[None]] = nullcontext
        self._waiting: dict[int, Batch] = {}
        self._rewards: dict[str, float] = {}

    @property
    def sampling_batch(self) -> int:  # type: ignore[override]
        """See `Method`."""
        return self._generation.batch

    def make_room(self, parked: Callable[[], AbstractContextManager[None]]) -> None:
        """See `Method`."""
        self.offload_context = parked

    def collect(self, update: int, reference: int | None) -> Any:
        """Returns the rows of an update; the first call in an iteration samples for all of its updates."""
        assert reference is not None
        if update not in self._waiting:
            started = time.perf_counter()
            self._waiting = self._roll_out(update, reference)
            self.seconds = (time.perf_counter() - started) / len(self._waiting)
        return self._waiting.pop(update)

    def rows(self, batch: Any) -> int:
        """Returns the number of rows that count, over all processes."""
        total: int = batch.total
        return total

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns means over the rows, and the statistics of the iteration's rewards; see `reward_statistics`."""
        return {name: value / rows for name, value in sums.items()} | self._rewards

    def _roll_out(self, first: int, newest: int) -> dict[int, Batch]:
        """Returns the batches of an iteration's updates from `first` on; a resumed run may start inside an iteration.

        All of the iteration is sampled again then, since advantages depend on all of its rewards.
        """
        length = self._config.train.updates_per_iteration
        begin = first - first % length
        window = range(begin, begin + length)
        keys = [key for update in window for key in self._keys(update)]
        with self.offload_context(), self._resident(newest) as model:
            try:
                samples = self._generation(keys, partial(self._sample, model))
                groups = self._reward(window, keys, samples)
            finally:
                self._parts.family.park_encoders()
            self._generation.agree()
            made = self._iteration(keys, samples, self._advantages(begin, groups))
            batches = {update: self._batch(made, update) for update in window if update >= first}
            # In the iteration's first update the policy is this past policy, and computes these numbers anyway. It is
            # not if the pool had no room for it: then an older one sampled.
            current = newest == begin // length
            for update, batch in batches.items():
                if update != begin or not current:
                    self._old(model, batch)
        if self._needs_initial:
            with self.offload_context(), self._resident(0) as model:
                for batch in batches.values():
                    self._initial(model, batch)
        return batches

    def _resident(self, number: int) -> AbstractContextManager[nn.Module]:
        pool = self._parts.draws.pool
        assert pool is not None
        return pool.resident(self._parts.model, number, self._aside)

    def _keys(self, update: int) -> Keys:
        """Returns the keys of this process's samples of an update, those of one prompt one after the other."""
        group = range(self._config.samples_per_prompt)
        return [
            (update, sample, *([number] if number else []))
            for sample in self._maker.sample_ids(update)
            for number in group
        ]

    def _prompt(self, key: tuple[int, ...]) -> str:
        return self._parts.cache.prompts[key[1] % len(self._parts.cache)]

    def _reward(self, window: range, keys: Keys, samples: Tensor) -> Groups:
        """Returns the rewards of all processes' samples; NaN where a sample has none. Notes their statistics."""
        self._generation.check()
        (rewards,) = self._score([self._prompt(key) for key in keys], self._finals(samples))
        groups = self._gathered(window, rewards)
        self._rewards = reward_statistics(self._sign * np.stack(list(groups.values())))
        return groups

    def _gathered(self, window: range, numbers: np.ndarray) -> Groups:
        """Returns all processes' numbers by update and position; each prompt has as many, one after the other."""
        processes = self._parts.processes
        processes.barrier(patient=True)  # another process may still be sampling
        places = [
            (update, processes.rank + processes.world * position)
            for update in window
            for position in range(len(self._maker.sample_ids(update)))
        ]
        own = numbers.reshape(len(places), -1)
        parts = processes.gather(dict(zip(places, own, strict=True)))
        merged = {place: values for part in parts for place, values in part.items()}
        return {place: merged[place] for place in sorted(merged)}

    def _iteration(self, keys: Keys, samples: Tensor, advantages: Groups) -> Iteration:
        rank, world = self._parts.processes.rank, self._parts.processes.world
        own = [values for (_, position), values in advantages.items() if position % world == rank]
        counts: dict[int, int] = {}
        for (update, _), values in advantages.items():
            counts[update] = counts.get(update, 0) + int(np.count_nonzero(~np.isnan(values)))
        total = sum(values.size for values in advantages.values())
        self._rewards["kept"] = sum(counts.values()) / total
        return Iteration(keys, samples, np.concatenate(own), counts)

    def _everyones_prompts(self, groups: Groups) -> list[str]:
        """Returns the prompt of each group, in the order of the groups."""
        made: dict[int, list[int]] = {}
        prompts = []
        for update, position in groups:
            ids = made.setdefault(update, self._maker.all_sample_ids(update))
            prompts.append(self._prompt((update, ids[position])))
        return prompts

    @property
    def _needs_initial(self) -> bool:
        """Whether the initial policy takes part in the loss."""
        return self._config.rl.kl > 0

    @abstractmethod
    def _sample(self, model: nn.Module, keys: Keys) -> Tensor:
        """Generates one sample per key: `(B, ...)` float32 on the CPU."""

    def _finals(self, samples: Tensor) -> Tensor:
        """Returns the latents `(n, *latent)` that are rewarded."""
        return samples

    @abstractmethod
    def _advantages(self, begin: int, rewards: Groups) -> Groups:
        """Returns what each reward teaches; NaN for samples to leave out, among them those of groups with NaN.

        Args:
            begin: the iteration's first update.
            rewards: all processes' rewards; higher is better.
        """

    @abstractmethod
    def _batch(self, made: Iteration, update: int) -> Any:
        """Returns this process's rows of an update; a spare one, of weight 0, if no row is kept."""

    @abstractmethod
    def _old(self, model: nn.Module, batch: Any) -> None:
        """Adds what the loss needs of the policy that sampled."""

    def _initial(self, model: nn.Module, batch: Any) -> None:
        """Adds what the loss needs of the initial policy."""


def scored(groups: Groups) -> dict[tuple[int, int], np.ndarray]:
    """Returns the groups in which every sample has a reward."""
    return {place: values for place, values in groups.items() if not np.isnan(values).any()}


def left_out(groups: Groups, known: Groups) -> Groups:
    """Returns the advantages of `known`, and NaN for groups that are missing there or whose advantages are all 0."""
    teach = {place: values for place, values in known.items() if values.any()}
    return {place: teach.get(place, np.full_like(values, np.nan)) for place, values in groups.items()}


def compared_in_groups(rewards: Groups, spread: Literal["batch", "group"]) -> Groups:
    """Returns GRPO's advantages; see `group_advantages`. Groups without spread or with a missing reward are left out.

    In a group with spread a sample of exactly its mean is kept: DiffusionNFT and a pull to the initial policy use it.
    """
    known = scored(rewards)
    if not known:
        return left_out(rewards, {})
    made = group_advantages(np.stack(list(known.values())), spread=spread, clip=ADVANTAGE_CLIP)
    return left_out(rewards, dict(zip(known, made, strict=True)))


def reward_statistics(rewards: np.ndarray) -> dict[str, float]:
    """Returns what is logged of rewards `(P, K)`, in the scorer's own direction; NaN where a sample has none.

    These are `reward_mean` and `reward_std` over all samples with a reward, `unscored`, the share of samples without
    one, and, for several samples per prompt, `zero_spread`, the share of prompts whose samples have equal rewards.
    """
    whole = rewards[~np.isnan(rewards).any(1)]
    known: Sequence[float] = rewards[~np.isnan(rewards)]  # type: ignore[assignment]
    found = {"unscored": float(np.isnan(rewards).mean())}
    if len(known):
        found |= {"reward_mean": float(np.mean(known)), "reward_std": float(np.std(known))}
    if rewards.shape[1] > 1 and len(whole):
        found["zero_spread"] = float(1 - has_spread(whole).mean())
    return found
