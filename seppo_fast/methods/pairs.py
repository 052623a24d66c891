"""Pairs: the batch that the learner trains on in one update.

For given data and settings, their examples, times and noise are a pure function of seed and update.

Shape legend: B is the number of pairs, b the number of pairs in a micro-batch. Tensors with 2B or 2b rows consist of
two halves: first the winners, then the losers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seppo_fast.config.schema import Config
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.schedule import Schedule
from seppo_fast.utils.random import keyed_noise, keyed_rng


@dataclass(frozen=True)
class Pairs:
    """The B pairs of one update, on the CPU.

    Attributes:
        sample_ids: B numbers, visit * len(data) + index of the example, where `visit` counts the passes over the data
            from 0. Within a run, each id occurs in `reference.uses` consecutive pairs (1 by default).
        winners: `(B, *latent)` float32.
        losers: `(B, *latent)` float32; None if the objective has none.
        times: `(B,)` in the schedule's dtype; a pair's winner and loser share one.
        noise: `(B, *latent)` if a pair's winner and loser share it, else `(2B, *latent)`, winner half first.
        conditioning: B rows, each for the pair's prompt, or for the empty prompt if the prompt was dropped.
        ref_error: `(2B,)` float32 denoising errors of the reference, winner half first, or `(B,)` without losers; None
            if they are not computed ahead of the update.
        verdict: `(B,)` float32, a scorer's verdict on each loser: 1 rejects it, -1 learns from it, 0 skips the pair;
            None if no scorer is asked.
        labels: `(B,)` bool, whether each winner is liked; None if the objective does not learn from labels.
    """

    sample_ids: tuple[int, ...]
    winners: Tensor
    losers: Tensor | None
    times: Tensor
    noise: Tensor
    conditioning: Conditioning
    ref_error: Tensor | None = None
    verdict: Tensor | None = None
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def micro_batches(self, size: int) -> Iterator[Pairs]:
        """Yields consecutive parts of at most `size` pairs."""
        for start in range(0, len(self), size):
            chosen = slice(start, start + size)
            yield Pairs(
                sample_ids=self.sample_ids[chosen],
                winners=self.winners[chosen],
                losers=None if self.losers is None else self.losers[chosen],
                times=self.times[chosen],
                noise=self._both_halves(self.noise, chosen),
                conditioning=self.conditioning.take(chosen),
                ref_error=None if self.ref_error is None else self._both_halves(self.ref_error, chosen),
                verdict=None if self.verdict is None else self.verdict[chosen],
                labels=None if self.labels is None else self.labels[chosen],
            )

    def _both_halves(self, rows: Tensor, chosen: slice) -> Tensor:
        if len(rows) == len(self):
            return rows[chosen]
        winner, loser = rows.chunk(2)
        return torch.cat([winner[chosen], loser[chosen]])

    def to(self, device: torch.device) -> Pairs:
        """Returns the same pairs on a device; copies to a GPU go through pinned memory, so the host does not wait."""
        tensors: dict[str, Any] = {
            name: sent(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        tensors["conditioning"] = self.conditioning.map(lambda tensor: sent(tensor, device))
        return replace(self, **tensors)


class NoisedBatch(NamedTuple):
    """The model's input for b pairs, winner half first, and the regression target.

    Attributes:
        latents: `(2b, *latent)` noised latents, or `(b, *latent)` without losers.
        times: one per row of `latents`.
        conditioning: one row per row of `latents`.
        target: in the shape of `latents`, or `(b, *latent)` if a pair's winner and loser share it.
    """

    latents: Tensor
    times: Tensor
    conditioning: Conditioning
    target: Tensor


def noised(pairs: Pairs, schedule: Schedule, device: torch.device) -> NoisedBatch:
    """Returns the noised inputs and targets of pairs, on the device."""
    pairs = pairs.to(device)
    latents = pairs.winners if pairs.losers is None else torch.cat([pairs.winners, pairs.losers])
    halves = len(latents) // len(pairs)
    noise = pairs.noise.repeat(len(latents) // len(pairs.noise), *[1] * (latents.dim() - 1))
    times = pairs.times.repeat(halves)
    return NoisedBatch(
        latents=schedule.add_noise(latents, noise, times),
        times=times,
        conditioning=pairs.conditioning.repeat(halves),
        target=pairs.noise if schedule.shared_target else schedule.target(latents, noise, times),
    )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on the device; a copy to a GPU goes through pinned memory, so the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    # Only host memory can be pinned; a tensor that is on the GPU already needs no copy.
    return tensor.pin_memory().to(device, non_blocking=True) if tensor.device.type == "cpu" else tensor


class PairMaker:
    """Makes the pairs of an update. The reference's samples and denoising errors are computed elsewhere.

    Attributes:
        world: number of processes.

    Args:
        config: the run's configuration.
        cache: latents and conditioning of the training data.
        schedule: the model's noise schedule, from which the times are drawn.
        rank: this process's rank.
        world: number of processes.
    """

    def __init__(
        self, config: Config, cache: LatentCache, schedule: Schedule, *, rank: int = 0, world: int = 1
    ) -> None:
        self._config = config
        self._objective = config.row
        self._cache = cache
        self._schedule = schedule
        self._rank, self.world = rank, world
        self._order: tuple[int, Tensor] | None = None

    def sample_ids(self, update: int) -> list[int]:
        """Returns this rank's sample ids of an update; ids are assigned to ranks round-robin, in whole blocks."""
        block = self._config.block
        ids = self.all_sample_ids(update)
        return [sample for place, sample in enumerate(ids) if place // block % self.world == self._rank]

    def all_sample_ids(self, update: int) -> list[int]:
        """Returns all ranks' sample ids of an update. Each example is used once before any is used again."""
        samples = self._config.prompts_per_update
        positions = range(update * samples, (update + 1) * samples)
        return [self._sample_id(*divmod(position, len(self._cache))) for position in positions]

    def _sample_id(self, visit: int, position: int) -> int:
        if self._order is None or self._order[0] != visit:
            permutation = keyed_rng(self._config.seed, "order", visit).permutation(len(self._cache))
            self._order = (visit, torch.from_numpy(permutation))
        return visit * len(self._cache) + int(self._order[1][position])

    def examples(self, sample_ids: Sequence[int]) -> list[int]:
        """Returns the indices of the samples' examples in the cache."""
        return [sample % len(self._cache) for sample in sample_ids]

    def generation(self, keys: Sequence[tuple[int, ...]]) -> tuple[Tensor, Conditioning, Conditioning]:
        """Returns the inputs from which a reference generates B samples, given their keys.

        A key is (update, sample id), with a number from 1 for each further sample of that id.

        Returns:
            The noise `(B, *latent)`; the conditioning for the samples' own prompts, B rows (prompt dropout does not
            apply); and the conditioning for the empty prompt, one row.
        """
        noise = keyed_noise(self._config.seed, "sample", keys, self._cache.latent_shape)
        rows = self._cache.conditioning([None, *self.examples([key[1] for key in keys])])
        return noise, rows.take(slice(1, None)), rows.take(slice(0, 1))

    def pairs(self, update: int, sample_ids: Sequence[int], losers: Tensor | None = None) -> Pairs:
        """Returns pairs with their times, noise and prompts: `reference.uses` consecutive pairs per sample id.

        Args:
            update: the update's index, from 0.
            sample_ids: the ids of the samples to make pairs of.
            losers: `(len(sample_ids), *latent)` generated losers. If None, the pairs get the data's labelled losers if
                the objective uses those, else no losers.
        """
        config, seed, uses = self._config, self._config.seed, self._config.reference.uses
        examples = self.examples(sample_ids)
        winners = self._cache.winners(examples).float().repeat_interleave(uses, 0)
        other = self._cache.losers(examples).float().repeat_interleave(uses, 0) if self._objective.needs_pairs else None
        prompts: list[int | None] = [example for example in examples for _ in range(uses)]
        # The key of the first use has no use number, so that it gives the same draws as reference.uses = 1.
        keys = [(update, sample, *([use] if use else [])) for sample in sample_ids for use in range(uses)]
        times = torch.empty(len(keys), dtype=self._schedule.dtype)
        for row, key in enumerate(keys):
            rng = keyed_rng(seed, "pair", *key)
            times[row] = self._schedule.draw(rng, winners.shape[1:])
            if rng.random() < config.data.prompt_dropout:
                prompts[row] = None
            if other is not None and self._objective.winners == "random" and rng.random() < 0.5:
                winners[row] = other[row]
        noise = keyed_noise(seed, "noise", keys, winners.shape[1:])
        if not config.train.share_noise and self._objective.negatives is not None:
            noise = torch.cat([noise, keyed_noise(seed, "loser noise", keys, winners.shape[1:])])
        if losers is not None and uses > 1:  # one use needs no copy: a view of the rollout's pinned buffer stays one
            losers = losers.repeat_interleave(uses, 0)
        elif losers is None and self._objective.negatives == "labelled":
            losers = other
        return Pairs(
            tuple(key[1] for key in keys),
            winners,
            losers,
            times,
            noise,
            self._cache.conditioning(prompts),
            labels=self._labels(examples).repeat_interleave(uses) if self._objective.needs_labels else None,
        )

    def _labels(self, examples: Sequence[int]) -> Tensor:
        numbers = self._cache.numbers
        assert numbers is not None, "a source with labels gives every example a number"
        return torch.tensor([numbers[example] == 1 for example in examples])
