"""DiffusionNFT: samples are trained on by the forward process, towards the good ones and away from the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
    """This process's rows of an update. Without rows there is a spare one that does not count.

    Attributes:
        rows: see `NftRows`.
        total: number of rows of the update that count, over all processes.
    """

    rows: NftRows
    total: int

    @property
    def sample_ids(self) -> tuple[int, ...]:
        """The id of each row."""
        return self.rows.pairs.sample_ids

    def __len__(self) -> int:
        return len(self.rows)

    def micro_batches(self, size: int) -> Iterator[NftRows]:
        """Yields consecutive micro-batches of at most `size` rows."""
        own = self.rows
        for start, pairs in zip(range(0, len(own.pairs), size), own.pairs.micro_batches(size), strict=True):
            chosen = slice(start, start + size)
            yield NftRows(
                pairs=pairs,
                optimality=own.optimality[chosen],
                old=None if own.old is None else own.old[chosen],
                initial=None if own.initial is None else own.initial[chosen],
                spare=own.spare,
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
        uses, seed, cache = self._config.reference.uses, self._config.seed, self._parts.cache
        kept = made.kept(update)
        spare = not kept
        chosen = [row for row in kept or [made.spare(update)] for _ in range(1 if spare else uses)]
        keys = [(*self._numbered(made.keys[row]), place % uses) for place, row in enumerate(chosen)]
        schedule, shape = self._parts.family.schedule, cache.latent_shape
        times = torch.tensor([schedule.draw(keyed_rng(seed, "nft", *key), shape) for key in keys], dtype=schedule.dtype)
        ids = tuple(key[1] for key in keys)
        pairs = Pairs(
            sample_ids=ids,
            winners=made.samples[chosen],
            losers=None,
            times=times,
            noise=keyed_noise(seed, "nft noise", keys, shape),
            conditioning=cache.conditioning([sample % len(cache) for sample in ids]),
        )
        optimality = torch.from_numpy(made.advantages[chosen] / (2 * ADVANTAGE_CLIP) + 0.5).float()
        return NftBatch(NftRows(pairs, optimality, None, None, spare), made.counts[update] * uses)

    @staticmethod
    def _numbered(key: tuple[int, ...]) -> tuple[int, int, int]:
        """Returns a sample's key with its number, also for the first sample."""
        return key[0], key[1], key[2] if len(key) > 2 else 0

    def _old(self, model: nn.Module, batch: NftBatch) -> None:
        batch.rows = replace(batch.rows, old=self._predicted(model, batch))

    def _initial(self, model: nn.Module, batch: NftBatch) -> None:
        batch.rows = replace(batch.rows, initial=self._predicted(model, batch))

    def _predicted(self, model: nn.Module, batch: NftBatch) -> Tensor:
        """Returns another model's predictions, computed in the learner's micro-batches, `(rows, *latent)` float32."""
        assert self._config.train.micro_batch is not None
        made = []
        for rows in batch.micro_batches(self._config.train.micro_batch):
            self._parts.interruption.check()
            made.append(predict_like_policy(self._parts.denoiser, model, self._shown(rows)).float().cpu())
        return torch.cat(made)
