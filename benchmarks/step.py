"""Suite `step`: one training step on given latents; the Diffusion-DPO script's against ours, over micro-batches.

The baseline holds two UNets and takes a pair at a time, two forwards each, with the loss of the paper's appendix B.2
(see `naive`). Ours makes the reference's errors `ahead` (the step alone, and with making them), `together` with the
policy's forward, or `apart`. A step of n pairs ends with clipping and AdamW for all providers; a unit is a pair;
launches and host syncs are those of a step.

Loss and gradient norm must agree with the baseline's in float32: on a policy that has moved away from its reference,
within 1e-3; and, as the step is timed, on a policy that has not, within 1e-3, or 5e-2 in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.counters import allocated, host_syncs, launches, peak_bytes
from benchmarks.measure import Bench, Machine, Provider, Stopwatch, agrees
from benchmarks.models import Workplace, workplace
from benchmarks.naive import NaiveLoop
from benchmarks.rows import Row
from seppo_fast.config import Config
from seppo_fast.diffusion import NoiseSchedule
from seppo_fast.pairs import PairMaker, Pairs
from seppo_fast.policy import trainable
from seppo_fast.reference_errors import WAYS
from seppo_fast.trainer import Trainer

NAIVE = "Diffusion-DPO script"
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2


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


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        pairs: of a step, by what is trained.
        rounds: of timing.
        ways: of ours, by name.
        checked: pairs on which values are compared in float32: enough for both kinds, rejected and learned.
        micro_batch: of these.
        recomputed: whether all providers recompute activations (gradient checkpointing).
    """

    pairs: dict[str, tuple[int, ...]]
    rounds: int
    ways: tuple[str, ...] = tuple(WAYS_TO_STEP)
    checked: int = 8
    micro_batch: int = 3
    recomputed: bool = False


SIZES = {
    "gpu": Size({"lora": (1, 4, 16, 32), "full": (1, 4, 16)}, rounds=7),
    "cpu": Size({"lora": (1, 8, 32), "full": (1, 8, 32)}, rounds=7),
    "quick": Size({"lora": (1, 4)}, rounds=3),
}
RightWays = dict[str, dict[str, bool]]
"""Whether each way agrees with the baseline, by what is trained and by name."""


def step_config(place: Workplace, train: str, pairs: int, way: Way, **model: Any) -> Config:
    """The configuration of a step of `pairs` pairs in one micro-batch."""
    return place.config(
        model={"train": train, "compile": way.compiled, "gradient_checkpointing": False, **model},
        data={"source": place.source(pairs)},
        train={"pairs_per_update": pairs, "micro_batch": pairs, "updates": 1000, "learning_rate": 1e-6},
        reference={"errors": way.errors},
        sampler={"batch": 1},
    )


class Ours:
    """The trainer, its losers made up from other pairs' winners.

    Args:
        config: of a step.
        way: how it is made.
        moved: whether the policy has moved away from checkpoint 0, its only reference.
    """

    def __init__(self, config: Config, way: Way, moved: bool) -> None:
        self.trainer = Trainer(config)
        if not way.channels_last:
            self.trainer.unet.to(memory_format=torch.contiguous_format)
        self.trainer.add_checkpoint()
        if moved:
            move(self.trainer.unet)
        self.pairs = given_pairs(self.trainer)
        # The rollout's own object is the trainer's; one more of the same kind asks for the errors alone.
        self._errors = WAYS["ahead"](self.trainer.forward, self.trainer.unet, self.trainer.config)
        self._ahead = way.errors == "ahead"
        if self._ahead:
            self.pairs = self.with_errors(self.pairs)
        self._update = 0

    def with_errors(self, pairs: Pairs) -> Pairs:
        """The pairs with the errors of checkpoint 0, as the rollout makes them."""
        references = self.trainer.references
        assert references is not None
        with self._errors.drawn(references, 0) as reference:
            errors = self._errors.ahead(reference, lambda: pairs)
        return replace(pairs, ref_error=errors)

    def step(self, count: int) -> list[Tensor]:
        """One update on the first `count` pairs; loss and gradient norm."""
        return self._step(next(self.pairs.micro_batches(count)))

    def step_with_errors(self, count: int) -> list[Tensor]:
        """The same, after the reference's errors on these pairs are made."""
        return self._step(self.with_errors(next(self.pairs.micro_batches(count))))

    def _step(self, pairs: Pairs) -> list[Tensor]:
        stats = self.trainer.learner.step(pairs, self._update)
        self._update += 1
        return [torch.tensor(stats["loss"]), torch.tensor(stats["grad_norm"])]


class Naive:
    """The script's step.

    Args:
        config: of a step.
        machine: where.
        pairs: what ours trains on.
        moved: as for `Ours`.
    """

    def __init__(self, config: Config, machine: Machine, pairs: Pairs, moved: bool) -> None:
        self._loop = NaiveLoop(config, machine)
        self._watch = Stopwatch(machine)
        if moved:
            move(self._loop.unet)
        assert pairs.losers is not None
        self._latents = [half.to(machine.device, self._loop.dtype) for half in (pairs.winners, pairs.losers)]
        self._embeds = pairs.prompt_embeds.to(machine.device, self._loop.dtype)
        self._pairs = pairs

    def step(self, count: int) -> list[Tensor]:
        """One update on the first `count` pairs, one at a time; loss and gradient norm."""
        total = 0.0
        for row in range(count):
            chosen = slice(row, row + 1)
            winner, loser = (half[chosen] for half in self._latents)
            noise, timestep = self._pairs.noise[row], self._pairs.timesteps[row]
            loss = self._loop.loss(winner, loser, self._embeds[chosen], noise, timestep, self._watch)
            (loss / count).backward()
            total += loss.item() / count  # as the script logs it
        return [torch.tensor(total), self._loop.step(self._watch)]


def given_pairs(trainer: Trainer) -> Pairs:
    """The pairs of update 0; the loser of each is the winner of the one before it, with some noise."""
    maker = PairMaker(trainer.config, trainer.cache, NoiseSchedule(trainer.family.scheduler_config).num_timesteps)
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


def rows(machine: Machine) -> list[Row]:
    """All rows of the suite."""
    bench, size = Bench(machine, "step"), SIZES[machine.size]
    with workplace(machine) as place:
        compare(bench, place, size, exact_values(place, size))
    return bench.rows


def compare(bench: Bench, place: Workplace, size: Size, right: RightWays) -> None:
    """Adds the rows of a size; `right`: which ways were found right in float32."""
    for train, counts in size.pairs.items():
        while not _fits(bench, place, size, train, counts, right[train]):
            print(f"{train}: {counts[-1]} pairs at once do not fit into memory and are left out")
            counts = counts[:-1]


def exact_values(place: Workplace, size: Size) -> RightWays:
    """Which ways agree with the baseline in float32, in micro-batches, on a policy that has moved."""
    return {train: _exact_values(place, size, train) for train in size.pairs}


def _fits(
    bench: Bench, place: Workplace, size: Size, train: str, counts: tuple[int, ...], right: dict[str, bool]
) -> bool:
    """Whether memory was enough to compare all ways to train one kind of weights; if so, their rows are there."""
    before = len(bench.rows)
    try:
        _compare(bench, place, size, train, counts, right)
    except torch.OutOfMemoryError:
        if len(counts) == 1:
            raise
        del bench.rows[before:]
        return False
    return True


@dataclass
class _Contender:
    """A provider before its rows: how it steps, whether its values are right, what it holds, its FLOP a pair."""

    step: Callable[[int], list[Tensor]]
    value_ok: bool
    held: int
    flops: float


def _ways(machine: Machine, size: Size, train: str) -> dict[str, Way]:
    """Those that are compared where these weights are trained."""
    return {
        name: way
        for name, way in WAYS_TO_STEP.items()
        if name in size.ways and train in way.trains and (machine.device.type == "cuda" or not way.compiled)
    }


def _compare(
    bench: Bench, place: Workplace, size: Size, train: str, counts: tuple[int, ...], right: dict[str, bool]
) -> None:
    """All ways to train one kind of weights."""
    machine, most = bench.machine, max(counts)
    config_of = partial(step_config, place, train, most, gradient_checkpointing=size.recomputed)
    tolerance = _TOLERANCE if machine.precision == "fp32" else _HALF_TOLERANCE
    policy, reference = 2 * place.flops(config_of(WAYS_TO_STEP["ahead"]).model), 2 * place.flops()  # of a pair
    contenders: dict[str, _Contender] = {}
    expected: list[Tensor] = []
    for name, way in _ways(machine, size, train).items():
        before = allocated(machine)
        ours = Ours(config_of(way), way, moved=False)
        if not expected:
            pairs = ours.pairs
            expected = Naive(config_of(way, precision="fp32"), machine, pairs, moved=False).step(most)
        ok = right[name] and _agree(f"{train}, {name}, {machine.precision}", ours.step(most), expected, tolerance)
        held = allocated(machine) - before
        flops = policy + (0 if way.errors == "ahead" else reference)
        contenders[name] = _Contender(ours.step, ok, held, flops)
        if name == "ahead":
            contenders[WITH_ERRORS] = _Contender(ours.step_with_errors, ok, held, policy + reference)
    before = allocated(machine)
    naive = Naive(config_of(WAYS_TO_STEP["ahead"]), machine, pairs, moved=False)
    naive.step(1)
    contenders = {NAIVE: _Contender(naive.step, True, allocated(machine) - before, policy + reference)} | contenders
    for count in counts:
        name = f"{train}, {count} pair{'s' * (count > 1)}{', recomputing' * size.recomputed}"
        _time(bench, place.titled("step", name), count, contenders, size.rounds)


def _exact_values(place: Workplace, size: Size, train: str) -> dict[str, bool]:
    expected: list[Tensor] = []
    right: dict[str, bool] = {}
    for name, way in _ways(place.machine, size, train).items():
        if way.compiled or not way.channels_last:  # checked as they are timed; the arithmetic is that of `ahead`
            right[name] = right["ahead"]
            continue
        config = step_config(place, train, size.checked, way, precision="fp32")
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size.micro_batch})})
        ours = Ours(config, way, moved=True)
        if not expected:
            expected = Naive(config, place.machine, ours.pairs, moved=True).step(size.checked)
        right[name] = _agree(f"{train}, {name}, float32", ours.step(size.checked), expected, _TOLERANCE)
    return right


def _agree(what: str, actual: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Whether loss and gradient norm agree, each for itself."""
    parts = zip(("loss", "gradient norm"), actual, expected, strict=True)
    return all(agrees(f"{what}, {part}", [ours], [theirs], tolerance) for part, ours, theirs in parts)


def _time(bench: Bench, case: str, count: int, contenders: dict[str, _Contender], rounds: int) -> None:
    providers = []
    for name, contender in contenders.items():

        def call(step: Callable[[int], list[Tensor]] = contender.step) -> list[Tensor]:
            return step(count)

        others = allocated(bench.machine) - contender.held
        providers.append(
            Provider(
                name,
                call,
                units=count,
                flops=count * contender.flops,
                value_ok=contender.value_ok,
                peak_bytes=peak_bytes(bench.machine, call, others),
                launches=launches(bench.machine, call),
                host_syncs=host_syncs(bench.machine, call),
            )
        )
        call()
    bench.case(case, providers, rounds)
