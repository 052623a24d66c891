"""What the suite `step` compares: ways to make a training step, ours and the Diffusion-DPO script's, on given pairs."""

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
    """One of our ways to make a step.

    Attributes:
        errors: `reference.errors`.
        trains: for which it exists: `lora`, `full`.
        compiled: whether the repeated blocks are compiled; on a GPU only.
        channels_last: memory format of the UNet; the trainer's own is channels last.
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
        trainer: whose policy it begins as, whose forward and settings it takes; it is left as it is.
        way: how a step is made.
        pairs: to train on; their reference is the trainer's policy.
        moved: whether the policy has moved away from that.
        stack: on which what it holds is closed.

    Attributes:
        unet: the policy.
    """

    def __init__(self, trainer: Trainer, way: Way, pairs: Pairs, moved: bool, stack: ExitStack) -> None:
        config = trainer.config
        self.unet = second(trainer.policy)
        if not way.channels_last:  # `to` would turn the weights that `second` shares
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
        """The pairs with the errors of the reference, as the rollout makes them."""
        with self._ahead.load_reference(self._references, 0) as reference:
            return replace(pairs, ref_error=self._ahead.ahead(reference, lambda: pairs))

    def step(self, count: int) -> list[Tensor]:
        """One update on the first `count` pairs; loss and gradient norm."""
        return self._step(next(self._pairs.micro_batches(count)))

    def step_with_errors(self, count: int) -> list[Tensor]:
        """The same, after the reference's errors on these pairs are made."""
        return self._step(self._with_errors(next(self._pairs.micro_batches(count))))

    def _step(self, pairs: Pairs) -> list[Tensor]:
        stats = self._learner.step(pairs, self._update)
        self._update += 1
        return [torch.tensor(stats["loss"]), torch.tensor(stats["grad_norm"])]


class Naive:
    """The script's step.

    Args:
        config: of a step.
        machine: where.
        pairs: what ours trains on.
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
        """One update on the first `count` pairs, `batch` at a time; loss and gradient norm."""
        total = 0.0
        for start in range(0, count, batch):
            rows = slice(start, min(start + batch, count))
            winners, losers = (half[rows] for half in self._latents)
            noise, timesteps = self._pairs.noise[rows], self._pairs.times[rows]
            loss = self._loop.loss(winners, losers, self._embeds[rows], noise, timesteps, self._watch)
            loss = loss * (len(noise) / count)
            loss.backward()
            total += loss.item()  # as the script logs it
        return [torch.tensor(total), self._loop.step(self._watch)]

    def step_at_once(self, count: int) -> list[Tensor]:
        """The same, all pairs at once."""
        return self.step(count, count)


def given_pairs(trainer: Trainer) -> Pairs:
    """The pairs of update 0; the loser of each is the winner of the one before it, with some noise."""
    maker = PairMaker(trainer.config, trainer.cache, trainer.family.schedule)
    ids = maker.sample_ids(0)
    winners = maker.pairs(0, ids).winners
    noise = torch.randn(winners.shape, generator=torch.Generator().manual_seed(0))
    return maker.pairs(0, ids, losers=winners.roll(1, 0) + 0.1 * noise)


@torch.no_grad()
def move(unet: nn.Module) -> None:
    """Moves the trained weights by 2 % of their size, and those that are zero by 0.01, alike for equal names."""
    generator = torch.Generator().manual_seed(1)
    for weight in trainable(unet).values():
        size = 0.02 * weight.square().mean().sqrt() if weight.any() else 0.01
        weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight.device))
