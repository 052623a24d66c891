"""Suite `endtoend`: whole updates, from pictures and prompts to new weights; the naive loop against the trainer.

A unit is a pair. Both loops train a LoRA on the same examples in the same order, with the same noises and timesteps,
and drop no prompt, so their weights must agree. That is checked first, in float32 at few steps, over two updates: the
change of the weights may differ by 0.1 (relative RMS; AdamW's first steps are nearly the sign of the gradient, so
elements whose gradient is near zero do differ). Ours counts the encoding of each example in full, as in a run that
visits each once; the naive loop encodes it when it comes. Loading the models counts for neither.

`exact` is the same sampler in both. `fast` (DPM-Solver++ in 20 steps, four draws of (timestep, noise) a sample) is
another distribution: its values are checked against the naive loop with those settings, and its time is compared with
the naive loop as it is. FLOP are those of the UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.counters import allocated, peak_bytes
from benchmarks.measure import Bench, Machine, Provider, Stopwatch, agrees
from benchmarks.models import Workplace, load_pixels, workplace
from benchmarks.naive import NaiveLoop
from benchmarks.rows import (
    ENCODING,
    GENERATION,
    NAIVE,
    NAIVE_FAST,
    OPTIMIZER,
    OURS,
    PHASES,
    POLICY,
    REFERENCE,
    SEPARATOR,
    Row,
    with_ratios,
)
from seppo_fast.config import Config
from seppo_fast.data.sources import open_source
from seppo_fast.diffusion import NoiseSchedule
from seppo_fast.pairs import PairMaker, Pairs
from seppo_fast.policy import trainable
from seppo_fast.reference_errors import WAYS
from seppo_fast.trainer import Trainer

_TOLERANCE = 0.1  # another flipper moves the change of the weights by 0.4 to 0.9
_MATMUL_ROUNDS = 5
_ENCODED_AT_ONCE = 8  # pictures, as the cache does


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        pairs: in an update of ours.
        naive_pairs: of these, on which the naive loop is timed: it makes them one after another.
        rounds: of timing, an update each.
        steps: of the solver in the exact mode.
        fast_steps: of the solver in the fast mode.
        uses: draws of (timestep, noise) a sample in the fast mode.
        micro_batch: pairs in our forward; None: what the trainer chooses.
        samples: that ours generates at once; None: what the trainer chooses.
        recomputed: whether both loops recompute activations; None: what the trainer chooses.
        compiled: whether ours compiles the repeated blocks; None: what the trainer chooses.
    """

    pairs: int
    naive_pairs: int
    rounds: int
    steps: int = 50
    fast_steps: int = 20
    uses: int = 4
    micro_batch: int | None = None
    samples: int | None = None
    recomputed: bool | None = None
    compiled: bool | None = None


SIZES = {
    "gpu": Size(pairs=64, naive_pairs=16, rounds=2),
    "cpu": Size(pairs=32, naive_pairs=16, rounds=3),
    "quick": Size(pairs=8, naive_pairs=8, rounds=2, steps=4, fast_steps=2, uses=2, micro_batch=8, samples=8),
}
CHECKED = Size(pairs=8, naive_pairs=8, rounds=1, steps=4, fast_steps=4, uses=2, micro_batch=3, samples=5)


def update_config(place: Workplace, size: Size, fast: bool, memory: str, precision: str) -> Config:
    """LoRA updates of `size.pairs` pairs: one for each round and one before them. No example comes twice."""
    updates, uses = size.rounds + 1, size.uses if fast else 1
    solver = {"name": "dpmsolver++", "steps": size.fast_steps} if fast else {"name": "ddim", "steps": size.steps}
    return place.config(
        memory=memory,
        model={"precision": precision, "gradient_checkpointing": size.recomputed, "compile": size.compiled},
        data={"source": place.source(size.pairs // uses * updates)},
        train={"updates": updates, "updates_per_iteration": updates, "pairs_per_update": size.pairs}
        | {"micro_batch": size.micro_batch},
        sampler=solver | {"batch": size.samples},
        reference={"uses": uses, "window": 1},
    )


class Ours:
    """The trainer, an update at a time, from checkpoint 0 as the only reference.

    Args:
        config: of the run.
        machine: where.

    Attributes:
        pairs: in an update.
    """

    def __init__(self, config: Config, machine: Machine) -> None:
        self._machine = machine
        self.trainer = Trainer(config)
        self.trainer.add_checkpoint()
        self.config = config = self.trainer.config
        self.pairs = config.train.pairs_per_update
        self.source = open_source(config.data.source)
        schedule = NoiseSchedule(self.trainer.family.scheduler_config)
        self.maker = PairMaker(config, self.trainer.cache, schedule.num_timesteps)
        # One more of the kind that the rollout calls, so that the errors can be timed by themselves.
        self._errors = WAYS["ahead"](self.trainer.forward, self.trainer.unet, config)

    @property
    def unet(self) -> nn.Module:
        """The policy."""
        return self.trainer.unet

    def update(self, number: int) -> Stopwatch:
        """Encodes the update's examples, rolls out, learns; seconds by phase."""
        family, watch = self.trainer.family, Stopwatch(self._machine)
        examples = [self.source[row] for row in self.maker.examples(self.maker.sample_ids(number))]
        family.encode_prompts([""])  # brings the encoders to the device
        at_once = max(1, _ENCODED_AT_ONCE // (family.frames or 1))
        with watch.phase(ENCODING):
            for start in range(0, len(examples), at_once):
                chosen = examples[start : start + at_once]
                images = np.stack([load_pixels(example, self.config) for example in chosen])
                family.encode_images(torch.from_numpy(images))
                family.encode_prompts(list(dict.fromkeys(example.prompt for example in chosen)))
        family.park_encoders()
        with watch.phase(GENERATION):
            pairs = self.trainer.rollout.pairs(number)
        with watch.phase(POLICY), _optimizer_timed(watch):
            self.trainer.learner.step(pairs, number)
        watch.seconds[POLICY] -= watch.seconds[OPTIMIZER]
        watch.seconds[REFERENCE] = self._seconds_of_errors(pairs)
        watch.seconds[GENERATION] -= watch.seconds[REFERENCE]
        return watch

    def _seconds_of_errors(self, pairs: Pairs) -> float:
        """What the reference's errors took within the rollout, found by making them once more."""
        references, watch = self.trainer.references, Stopwatch(self._machine)
        assert references is not None
        with self._errors.drawn(references, 0) as reference:
            started = watch.now()
            self._errors.ahead(reference, lambda: pairs)
            return watch.now() - started


class Naive:
    """The naive loop on the pairs of a run of ours.

    Args:
        ours: whose examples, order, noises and timesteps are taken.
        machine: where.
        pairs: of each update, from its first; None: all.

    Attributes:
        pairs: in an update.
    """

    def __init__(self, ours: Ours, machine: Machine, pairs: int | None = None) -> None:
        self._ours = ours
        self.pairs = pairs or ours.pairs
        self._loop = NaiveLoop(ours.config, machine)

    @property
    def unet(self) -> nn.Module:
        """The policy."""
        return self._loop.unet

    def update(self, number: int) -> Stopwatch:
        """One update; seconds by phase."""
        maker = self._ours.maker
        ids = maker.sample_ids(number)[: self.pairs // self._ours.config.reference.uses]
        examples = [self._ours.source[row] for row in maker.examples(ids)]
        start_noise, _ = maker.generation([(number, sample) for sample in ids])
        return self._loop.update(examples, start_noise, maker.pairs(number, ids))


@contextmanager
def _optimizer_timed(watch: Stopwatch) -> Iterator[None]:
    """Adds the time of every optimizer's step inside the block to the watch."""
    started: list[float] = []
    handles = (
        register_optimizer_step_pre_hook(lambda *_: started.append(watch.now())),
        register_optimizer_step_post_hook(lambda *_: watch.add(OPTIMIZER, watch.now() - started.pop())),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Runner:
    """A loop that has made its first update: whether its values are right, peak memory, FLOP of a pair by phase."""

    loop: Ours | Naive
    value_ok: bool
    peak_bytes: int | None
    flops: dict[str, float]


def rows(machine: Machine) -> list[Row]:
    """All rows of the suite."""
    bench, size = Bench(machine, "endtoend"), SIZES[machine.size]
    with workplace(machine) as place:
        compare(bench, place, size, {fast: weights_agree(place, fast) for fast in (False, True)})
    return bench.rows


def compare(bench: Bench, place: Workplace, size: Size, right: dict[bool, bool]) -> None:
    """Adds the rows of a size.

    Args:
        bench: what takes them.
        place: the model.
        size: how much is done.
        right: by mode, fast or not, whether it was found right; one that is not there is left out, never the exact one.
    """
    machine = bench.machine
    runners: dict[tuple[str, bool], _Runner] = {}
    for fast, value_ok in right.items():
        config = update_config(place, size, fast, "fast", machine.precision)
        ours = _runner(place, config, value_ok, partial(Ours, config, machine))
        assert isinstance(ours.loop, Ours)
        runners[NAIVE, fast] = _runner(place, config, True, partial(Naive, ours.loop, machine, size.naive_pairs))
        runners[OURS, fast] = ours
    watches: dict[tuple[str, bool], list[Stopwatch]] = {key: [] for key in runners}
    for number in range(1, size.rounds + 1):
        for key, runner in runners.items():
            watches[key].append(runner.loop.update(number))
    bench.measure_limit(_MATMUL_ROUNDS)
    members = {f"exact: DDIM {size.steps} steps": {NAIVE: (NAIVE, False), OURS: (OURS, False)}}
    if True in right:
        name = f"fast (another distribution): DPM-Solver++ {size.fast_steps} steps, {size.uses} draws a sample"
        members[name] = {NAIVE: (NAIVE, False), NAIVE_FAST: (NAIVE, True), OURS: (OURS, True)}
    for case, keys in members.items():
        chosen = {who: (runners[key], watches[key]) for who, key in keys.items()}
        _report(bench, place.titled("update", case), chosen)


def _runner(place: Workplace, config: Config, value_ok: bool, build: Callable[[], Ours | Naive]) -> _Runner:
    machine = place.machine
    before = allocated(machine)
    loop = build()
    peak = peak_bytes(machine, lambda: loop.update(0), before)
    if peak is None:
        loop.update(0)
    forward = 2 * place.flops()  # of a pair
    flops = {
        GENERATION: forward * config.sampler.steps / config.reference.uses,
        REFERENCE: forward,
        POLICY: 2 * place.flops(config.model),
    }
    return _Runner(loop, value_ok, peak, flops)


def _report(bench: Bench, case: str, members: dict[str, tuple[_Runner, list[Stopwatch]]]) -> None:
    """Adds the rows of a case: the whole, and each phase."""
    for phase in (None, *PHASES):
        made = []
        for name, (runner, watches) in members.items():
            whole = [sum(watch.seconds.values()) for watch in watches]
            taken = whole if phase is None else [watch.seconds[phase] for watch in watches]
            flops = sum(runner.flops.values()) if phase is None else runner.flops.get(phase)
            provider = Provider(
                name,
                partial(runner.loop.update, 0),
                units=runner.loop.pairs,
                flops=None if flops is None else runner.loop.pairs * flops,
                value_ok=runner.value_ok,
                peak_bytes=runner.peak_bytes if phase is None else None,
            )
            row = bench.row(case if phase is None else case + SEPARATOR + phase, provider, NAIVE, taken)
            rate = row.pairs_per_s if phase is None else None
            made.append(replace(row, pairs_per_s=rate, share_of_step=float(np.median(taken) / np.median(whole))))
        bench.rows += with_ratios(made)


def weights_agree(place: Workplace, fast: bool, checked: Size = CHECKED) -> bool:
    """Whether two updates of both loops, in float32 and few steps, change the weights alike."""
    config = update_config(place, checked, fast, "balanced", "fp32")
    changes = weight_changes(config, place.machine)
    return agrees(f"change of the weights, {'fast' if fast else 'exact'} mode, float32", *changes, _TOLERANCE)


def weight_changes(config: Config, machine: Machine) -> tuple[list[Tensor], list[Tensor]]:
    """By how much all updates of a run change the trained weights: ours, and the naive loop's."""
    ours = Ours(config, machine)
    changes = []
    for loop in (ours, Naive(ours, machine)):
        before = [weight.detach().clone() for weight in trainable(loop.unet).values()]
        for number in range(config.train.updates):
            loop.update(number)
        after = trainable(loop.unet).values()
        changes.append([weight.detach() - old for weight, old in zip(after, before, strict=True)])
    return changes[0], changes[1]
