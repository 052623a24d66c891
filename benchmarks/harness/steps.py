"""What suite `step` compares: training steps on given pairs, in our ways and in the Diffusion-DPO script's."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import Machine, Stopwatch
from benchmarks.harness.models import second
from benchmarks.harness.naive import NaiveLoop
from seppo_fast.config.schema import Config
from seppo_fast.methods.pairs import PairMaker, Pairs
from seppo_fast.methods.preference import PreferenceMethod
from seppo_fast.methods.reference_errors import REFERENCE_STRATEGIES
from seppo_fast.models.encoders import PROMPT_EMBEDS
from seppo_fast.models.trainable import compile_blocks, trainable
from seppo_fast.train.learner import Learner
from seppo_fast.train.setup import open_pool
from seppo_fast.train.trainer import Trainer

NAIVE, NAIVE_BATCH = "Diffusion-DPO script", "Diffusion-DPO script, same micro-batch"


@dataclass(frozen=True)
class Way:
    """One of our ways to run a step.

    Attributes:
        errors: the value of `reference.errors`.
        trains: the values of `model.train` that it supports: `lora`, `full`.
        compiled: whether the repeated blocks are compiled; on a GPU only.
        channels_last: whether the UNet is in channels_last format, as in the trainer.
    """

    errors: str
    trains: tuple[str, ...] = ("lora", "full")
    compiled: bool = False
    channels_last: bool = True


WAYS_TO_STEP = {
    "ahead": Way("ahead"),
    "ahead, channels first": Way("ahead", channels_last=False),
    "ahead, compiled": Way("ahead", compiled=True),
    "together": Way("together", trains=("lora",)),
    "apart": Way("apart"),
}
WITH_ERRORS = "ahead, with making them"


class Ours:
    """The trainer's learner in one of our ways, on a policy of its own.

    Args:
        trainer: a trainer, whose policy is copied and whose forward and settings are used; it is not changed.
        way: how a step is run.
        pairs: the pairs to train on; their reference is the trainer's policy.
        moved: whether the policy is first moved away from its reference.
        stack: closes what this object opens.

    Attributes:
        unet: the policy.
    """

    def __init__(self, trainer: Trainer, way: Way, pairs: Pairs, moved: bool, stack: ExitStack) -> None:
        config = trainer.config
        self.unet = second(trainer.policy)
        if not way.channels_last:  # `to` on a copy by `second` would convert the shared weights
            self.unet = copy.deepcopy(trainer.policy).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        settings = config.reference.model_copy(update={"errors": way.errors})
        parts = replace(trainer.parts, config=config.model_copy(update={"reference": settings}), model=self.unet)
        method = PreferenceMethod(parts)
        self._ahead = REFERENCE_STRATEGIES["ahead"](
            trainer.family, trainer.denoiser, trainer.sampler, self.unet, config
        )
        pool = open_pool(config, trainer.processes.machine)
        assert pool is not None
        self._references = stack.enter_context(pool)
        if way.errors == "ahead":
            self._references.add(self.unet)
        if way.compiled:
            compile_blocks(self.unet, config.model.attention, trainer.family)
        if moved:
            move(self.unet)
        self._learner = Learner(self.unet, method, config, trainer.processes, trainer.interruption)
        self._pairs = self._with_errors(pairs) if way.errors == "ahead" else pairs
        self._update = 0

    def _with_errors(self, pairs: Pairs) -> Pairs:
        """Returns the pairs with the reference's errors, computed as in the rollout."""
        with self._ahead.load_reference(self._references, 0) as reference:
            return replace(pairs, ref_error=self._ahead.ahead(reference, lambda: pairs))

    def step(self, count: int) -> list[Tensor]:
        """Runs one update on the first `count` pairs; returns loss and gradient norm."""
        return self._step(next(self._pairs.micro_batches(count)))

    def step_with_errors(self, count: int) -> list[Tensor]:
        """Computes the reference's errors on these pairs, then does the same."""
        return self._step(self._with_errors(next(self._pairs.micro_batches(count))))

    def _step(self, pairs: Pairs) -> list[Tensor]:
        stats = self._learner.step(pairs, self._update)
        self._update += 1
        return [torch.tensor(stats["loss"]), torch.tensor(stats["grad_norm"])]


class Naive:
    """The Diffusion-DPO script's step.

    Args:
        config: the configuration of a step.
        machine: the machine that it runs on.
        pairs: the pairs that ours trains on.
        moved: as for `Ours`.

    Attributes:
        unet: the policy.
    """

    def __init__(self, config: Config, machine: Machine, pairs: Pairs, moved: bool) -> None:
        self._loop = NaiveLoop(config, machine)
        self._watch = Stopwatch(machine)
        self.unet = self._loop.unet
        if moved:
            move(self.unet)
        assert pairs.losers is not None
        self._latents = [half.to(machine.device, self._loop.dtype) for half in (pairs.winners, pairs.losers)]
        self._embeds = pairs.conditioning[PROMPT_EMBEDS].to(machine.device, self._loop.dtype)
        self._pairs = pairs

    def step(self, count: int, batch: int = 1) -> list[Tensor]:
        """Runs one update on the first `count` pairs, `batch` at a time; returns loss and gradient norm."""
        total = 0.0
        for start in range(0, count, batch):
            rows = slice(start, min(start + batch, count))
            winners, losers = (half[rows] for half in self._latents)
            noise, timesteps = self._pairs.noise[rows], self._pairs.times[rows]
            loss = self._loop.loss(winners, losers, self._embeds[rows], noise, timesteps, self._watch)
            loss = loss * (len(noise) / count)
            loss.backward()
            total += loss.item()  # as in the script, which logs it
        return [torch.tensor(total), self._loop.step(self._watch)]

    def step_at_once(self, count: int) -> list[Tensor]:
        """Runs the same update on all pairs at once."""
        return self.step(count, count)


def given_pairs(trainer: Trainer) -> Pairs:
    """Returns the pairs of update 0; each loser is the winner of the preceding pair, with some noise."""
    maker = PairMaker(trainer.config, trainer.cache, trainer.family.schedule)
    ids = maker.sample_ids(0)
    winners = maker.pairs(0, ids).winners
    noise = torch.randn(winners.shape, generator=torch.Generator().manual_seed(0))
    return maker.pairs(0, ids, losers=winners.roll(1, 0) + 0.1 * noise)


@torch.no_grad()
def move(unet: nn.Module) -> None:
    """Moves trained tensors by 2 % of their RMS, or 0.01 if they are zero; the same for modules of equal structure."""
    generator = torch.Generator().manual_seed(1)
    for weight in trainable(unet).values():
        size = 0.02 * weight.square().mean().sqrt() if weight.any() else 0.01
        weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight.device))
