"""What suite `endtoend` compares: the trainer and the naive loop, one update at a time, and their changed weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.harness.measure import Machine, Stopwatch
from benchmarks.harness.models import load_pixels
from benchmarks.harness.naive import NaiveLoop
from benchmarks.harness.rows import ENCODING, GENERATION, NAIVE, NAIVE_BATCH, OPTIMIZER, OURS, POLICY, REFERENCE
from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.methods.pairs import PairMaker, Pairs
from seppo_fast.methods.reference_errors import REFERENCE_STRATEGIES
from seppo_fast.models.trainable import trainable
from seppo_fast.train.trainer import Trainer

_ENCODED_AT_ONCE = 8  # pictures per batch, as in the cache


class Ours:
    """The trainer, run one update at a time, with checkpoint 0 as its only reference.

    Args:
        config: the run's configuration.
        machine: the machine that it runs on.

    Attributes:
        pairs: pairs per update.
    """

    def __init__(self, config: Config, machine: Machine) -> None:
        self._machine = machine
        self.trainer = Trainer(config)
        self.trainer.add_checkpoint()
        self.config = config = self.trainer.config
        self.pairs = config.train.pairs_per_update
        self.source = open_source(config.data.source)
        family, denoiser = self.trainer.family, self.trainer.denoiser
        self.maker = PairMaker(config, self.trainer.cache, family.schedule)
        # A second instance of what the rollout calls, so that the reference's errors can be timed separately.
        self._errors = REFERENCE_STRATEGIES["ahead"](
            family, denoiser, self.trainer.sampler, self.trainer.policy, config
        )

    @property
    def unet(self) -> nn.Module:
        """The policy."""
        return self.trainer.policy

    def close(self) -> None:
        """Closes the pool of past policies."""
        assert self.trainer.references is not None
        self.trainer.references.close()

    def update(self, number: int) -> Stopwatch:
        """Encodes the update's examples, rolls out and learns; returns the seconds by phase."""
        family, watch = self.trainer.family, Stopwatch(self._machine)
        examples = [self.source[row] for row in self.maker.examples(self.maker.sample_ids(number))]
        family.encode_prompts([""])  # moves the encoders to the device
        at_once = max(1, _ENCODED_AT_ONCE // (family.frames or 1))
        with watch.phase(ENCODING):
            for start in range(0, len(examples), at_once):
                chosen = examples[start : start + at_once]
                images = np.stack([load_pixels(example, self.config) for example in chosen])
                family.encode_images(torch.from_numpy(images))
                family.encode_prompts(list(dict.fromkeys(example.prompt for example in chosen)))
        family.park_encoders()
        with watch.phase(GENERATION):
            pairs = cast(Pairs, self.trainer.method.collect(number, self.trainer.draws.reference(number)))
        with watch.phase(POLICY), _optimizer_timed(watch):
            self.trainer.learner.step(pairs, number)
        watch.seconds[POLICY] -= watch.seconds[OPTIMIZER]
        watch.seconds[REFERENCE] = self._seconds_of_errors(pairs)
        watch.seconds[GENERATION] -= watch.seconds[REFERENCE]
        return watch

    def _seconds_of_errors(self, pairs: Pairs) -> float:
        """Returns the seconds that the reference's errors took within the rollout, by computing them once more."""
        references, watch = self.trainer.references, Stopwatch(self._machine)
        assert references is not None
        with self._errors.load_reference(references, 0) as reference:
            started = watch.now()
            self._errors.ahead(reference, lambda: pairs)
            return watch.now() - started


class Naive:
    """The naive loop on the pairs of one of our runs.

    Args:
        ours: the run whose examples, order, noises and timesteps are used.
        loop: the training loop, with the settings of that run.
        pairs: how many pairs of each update to train on, counted from its first; None: all.
        batch: pairs processed at a time.

    Attributes:
        pairs: pairs per update.
    """

    def __init__(self, ours: Ours, loop: NaiveLoop, pairs: int | None = None, batch: int = 1) -> None:
        self._ours = ours
        self.pairs = pairs or ours.pairs
        self._loop = loop
        self._batch = batch

    @property
    def unet(self) -> nn.Module:
        """The policy."""
        return self._loop.unet

    def update(self, number: int) -> Stopwatch:
        """Runs one update and returns the seconds by phase."""
        maker = self._ours.maker
        ids = maker.sample_ids(number)[: self.pairs // self._ours.config.reference.uses]
        examples = [self._ours.source[row] for row in maker.examples(ids)]
        start_noise, *_ = maker.generation([(number, sample) for sample in ids])
        return self._loop.update(examples, start_noise, maker.pairs(number, ids), self._batch)


@contextmanager
def _optimizer_timed(watch: Stopwatch) -> Iterator[None]:
    """Adds the time of every optimizer step inside the block to the watch."""
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


def weight_changes(config: Config, machine: Machine) -> dict[str, list[Tensor]]:
    """Returns the total weight changes of a run: by ours, by the naive loop, and by the naive loop in batches."""
    ours = Ours(config, machine)
    loops: dict[str, Ours | Naive] = {
        OURS: ours,
        NAIVE: Naive(ours, NaiveLoop(ours.config, machine)),
        NAIVE_BATCH: Naive(ours, NaiveLoop(ours.config, machine), batch=config.train.micro_batch or 1),
    }
    changes = {}
    for name, loop in loops.items():
        before = [weight.detach().clone() for weight in trainable(loop.unet).values()]
        for number in range(config.train.updates):
            loop.update(number)
        after = trainable(loop.unet).values()
        changes[name] = [weight.detach() - old for weight, old in zip(after, before, strict=True)]
    ours.close()
    return changes
