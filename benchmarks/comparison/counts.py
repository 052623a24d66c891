"""Counts what a run does by hooks: rows of the loss, generated samples, rows through the network, decoding, scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.ablations.piece import Rows
from seppo_fast.methods.generation import Generation
from seppo_fast.methods.rewards.scoring import LatentScorer
from seppo_fast.models.unet import UNetFamily
from seppo_fast.train.trainer import Trainer


class Counts:
    """What one run does. Start the run inside `counting`, and call `follow` before its first update.

    Attributes:
        pairs: rows of the loss: pairs, single pictures or steps of the sampler, by the method.
        samples: samples generated for training; candidates of SPO's steps are not samples.
        decoded: latents decoded.
        scored: pictures passed to a scorer.
    """

    def __init__(self) -> None:
        self.pairs = self.samples = self.decoded = self.scored = 0
        self._network: Rows | None = None
        self._paused = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts inside the block what any run of this process samples and scores."""

        def sampled(keys: Any, *rest: Any) -> None:
            self.samples += len(keys)

        def scored(prompts: Any, *sets: Any) -> None:
            self.scored += len(prompts) * len(sets)

        with _told(Generation, sampled), _told(LatentScorer, scored):
            yield

    def follow(self, trainer: Trainer) -> None:
        """Counts what the trainer's network, decoder and learner do from now on."""
        assert isinstance(trainer.family, UNetFamily)
        self._network = Rows(trainer.policy)
        step = trainer.learner.step

        def counted(batch: Any, update: int) -> dict[str, float]:
            rows = trainer.method.rows(batch)
            self.pairs += trainer.config.train.pairs_per_update if rows is None else rows
            return step(batch, update)

        def decoded(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            self.decoded += 0 if self._paused else len(inputs[0])

        trainer.learner.step = counted  # type: ignore[method-assign]
        trainer.family.pipe.vae.decoder.register_forward_hook(decoded)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Counts nothing inside the block, in which the run is judged."""
        assert self._network is not None, "call follow first"
        self._paused = self._network.paused = True
        yield
        self._paused = self._network.paused = False

    def used(self, before: int = 0) -> dict[str, int]:
        """Returns all counts.

        `rows` are the rows through the network, a backward counted as two forwards, and `before`, those of an earlier
        stage.
        """
        assert self._network is not None, "call follow first"
        own = {"pairs": self.pairs, "samples": self.samples, "decoded": self.decoded, "scored": self.scored}
        return own | {"rows": self._network.equivalent + before}


@contextmanager
def _told(owner: type, tell: Callable[..., None]) -> Iterator[None]:
    """Calls `tell` with the arguments of each call of an instance of `owner` inside the block."""
    original = owner.__call__

    def call(own: Any, *arguments: Any, **named: Any) -> Any:
        tell(*arguments)
        return original(own, *arguments, **named)

    owner.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        owner.__call__ = original  # type: ignore[method-assign]
