"""DiffusionNFT: samples are trained on by the forward process, towards the good ones and away from the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.loss import denoising_errors
from seppo_fast.methods.generation import Keys
from seppo_fast.methods.losses.nft import nft, nft_targets
from seppo_fast.methods.losses.rows import LossRows, mean_absolute_errors, weighted_error_gradient, with_pull
from seppo_fast.methods.method import StepLoss
from seppo_fast.methods.pairs import NoisedBatch, Pairs, noised, sent
from seppo_fast.methods.reference_errors import predict_like_policy
from seppo_fast.methods.rewards.advantages import ADVANTAGE_CLIP
from seppo_fast.methods.rewards.method import Groups, Iteration, RewardMethod, compared_in_groups
from seppo_fast.utils.random import keyed_noise, keyed_rng


@dataclass(frozen=True)
class NftRows:
    """Rows of a micro-batch, on the CPU.

    Attributes:
        pairs: the samples as winners, without losers, with their times and noise.
        optimality: `(b,)` float32, how good each sample is, from 0 to 1.
        old: `(b, *latent)` predictions of the policy that sampled; None if it is the one being trained.
        initial: `(b, *latent)` predictions of the initial policy; None without `rl.kl`.
        spare: whether the row does not count; see `NftBatch`.
    """

    pairs: Pairs
    optimality: Tensor
    old: Tensor | None
    initial: Tensor | None
    spare: bool

    def __len__(self) -> int:
        return 0 if self.spare else len(self.pairs)


@dataclass
class NftBatch:
    """This process's rows of an update, made when they are needed. Without rows there is a spare one.

    Attributes:
        keys: the keys of the rows: those of their samples, and the number of the draw.
        total: number of rows of the update that count, over all processes.
        samples: the iteration's samples `(n, *latent)`, float32 on the CPU.
        places: the rows' places among them.
        optimality: `(B,)` float32; see `NftRows`.
        draws: makes pairs from keys and their samples, with times and noise.
        spare: whether the only row does not count.
        old: `(B, *latent)`; see `NftRows`.
        initial: `(B, *latent)`; see `NftRows`.
    """

    keys: Keys
    total: int
    samples: Tensor
    places: Sequence[int]
    optimality: Tensor
    draws: Callable[[Keys, Tensor], Pairs]
    spare: bool
    old: Tensor | None = None
    initial: Tensor | None = None

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """The id of each row."""
        return tuple(key[1] for key in self.keys)

    def __len__(self) -> int:
        return 0 if self.spare else len(self.keys)

    def micro_batches(self, size: int) -> Iterator[NftRows]:
        """Yields consecutive micro-batches of at most `size` rows."""
        for start in range(0, len(self.keys), size):
            chosen = slice(start, start + size)
            samples = self.samples[self.places[chosen]]
            # A spare row's gradient is multiplied by 0, which would not remove a value that is not finite.
            samples = torch.zeros_like(samples) if self.spare else samples
            yield NftRows(
                pairs=self.draws(self.keys[chosen], samples),
                optimality=self.optimality[chosen],
                old=None if self.old is None else self.old[chosen],
                initial=None if self.initial is None else self.initial[chosen],
                spare=self.spare,
            )


class NftMethod(RewardMethod):
    """Trains on samples by two denoising errors, of an implicit positive and an implicit negative policy.

    `reference.uses` is the number of draws of (time, noise) per sample. The published code takes the sampler's own
    times; here they are drawn as in the other methods. Samples are made with `sampler.guidance`, which is 1 in the
    published recipes; the prediction that is trained is the conditional one.

    Args:
        parts: the run's parts.
    """

    def loss(self, policy: nn.Module, micro_batch: NftRows, grad_scale: Tensor) -> StepLoss:
        """Returns the loss on a micro-batch, by one forward without guidance."""
        shown = self._shown(micro_batch)
        prediction = self._parts.denoiser.denoise(policy, *shown[:3])
        made, targets = self._rows(prediction.detach(), shown.target, micro_batch)
        gradient = weighted_error_gradient(prediction, targets, made.coefficients * grad_scale)
        # A spare row has a factor of 0 on its gradient already.
        return StepLoss(
            prediction, gradient, {name: value * min(1, len(micro_batch)) for name, value in made.sums.items()}
        )

    def _rows(self, prediction: Tensor, target: Tensor, rows: NftRows) -> tuple[LossRows, list[Tensor]]:
        """Returns the loss, and the targets that its coefficients belong to."""
        device, backend, mix = prediction.device, self._config.train.backend, self._config.rl.mix
        old = prediction if rows.old is None else sent(rows.old, device)
        targets = list(nft_targets(target.float(), old.float(), mix=mix))
        plus, minus = (denoising_errors(prediction, one, backend=backend) for one in targets)
        abs_plus, abs_minus = (mean_absolute_errors(prediction, one) for one in targets)
        made = nft(plus, minus, abs_plus, abs_minus, sent(rows.optimality, device), mix=mix)
        if rows.initial is not None:
            initial = sent(rows.initial, device)
            gap = denoising_errors(prediction, initial, backend=backend)
            made = with_pull(made, "kl", gap, self._config.rl.kl)
            targets.append(initial)
        return made, targets

    def _shown(self, rows: NftRows) -> NoisedBatch:
        return noised(rows.pairs, self._parts.family.schedule, self._parts.denoiser.device)

    def _sample(self, model: nn.Module, keys: Keys) -> Tensor:
        return self._parts.denoiser.sample(model, self._parts.sampler, *self._maker.generation(keys))

    def _advantages(self, begin: int, rewards: Groups) -> Groups:
        return compared_in_groups(rewards, self._config.rl.spread)

    def _batch(self, made: Iteration, update: int) -> NftBatch:
        uses, kept = self._config.reference.uses, made.kept(update)
        spare = not kept
        places = [place for place in kept or [made.spare(update)] for _ in range(1 if spare else uses)]
        advantages = np.nan_to_num(made.advantages[places])
        return NftBatch(
            keys=[(*self._numbered(made.keys[place]), number % uses) for number, place in enumerate(places)],
            total=made.counts[update] * uses,
            samples=made.samples,
            places=places,
            optimality=torch.from_numpy(advantages / (2 * ADVANTAGE_CLIP) + 0.5).float(),
            draws=self._draws,
            spare=spare,
        )

    def _draws(self, keys: Keys, samples: Tensor) -> Pairs:
        """Returns samples as winners, with the times and the noise of their keys."""
        seed, cache, schedule = self._config.seed, self._parts.cache, self._parts.family.schedule
        shape = cache.latent_shape
        times = [schedule.draw(keyed_rng(seed, "nft", *key), shape) for key in keys]
        ids = tuple(key[1] for key in keys)
        return Pairs(
            sample_ids=ids,
            winners=samples,
            losers=None,
            times=torch.tensor(times, dtype=schedule.dtype),
            noise=keyed_noise(seed, "nft noise", keys, shape),
            conditioning=cache.conditioning([sample % len(cache) for sample in ids]),
        )

    @staticmethod
    def _numbered(key: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns a sample's key with its number, also for the first sample."""
        return key[0], key[1], key[2] if len(key) > 2 else 0

    def _old(self, model: nn.Module, batch: NftBatch) -> None:
        batch.old = self._predicted(model, batch)

    def _initial(self, model: nn.Module, batch: NftBatch) -> None:
        batch.initial = self._predicted(model, batch)

    def _predicted(self, model: nn.Module, batch: NftBatch) -> Tensor:
        """Returns another model's predictions, computed in the learner's micro-batches, `(rows, *latent)` float32."""
        assert self._config.train.micro_batch is not None
        made = []
        for rows in batch.micro_batches(self._config.train.micro_batch):
            self._parts.interruption.check()
            made.append(predict_like_policy(self._parts.denoiser, model, self._shown(rows)).float().cpu())
        return torch.cat(made)
