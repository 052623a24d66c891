"""Three ways to the reference's errors on a pair's two noised halves, with one interface.

`ahead`: made in the rollout, with the reference's weights in the policy's place; the learner holds no reference.
`apart`: a second module beside the policy, a second forward in each step.
`together`: one forward of a batch of both; for a LoRA, whose frozen weights both share.
All three reduce the errors alike, so they train to the same weights; where a shared batch rounds otherwise, `together`
differs by that.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.loss import Backend, denoising_errors
from seppo_fast.methods.joint_forward import JointModel
from seppo_fast.methods.pairs import NoisedBatch, Pairs, noised
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.references.pool import ReferencePool


class Predictions(NamedTuple):
    """What a loss is made of, on b noised pairs, winner half first.

    Attributes:
        policy: the policy's prediction, as the noised latents.
        target: what should be predicted; see `NoisedBatch`.
        ref_error: errors of the reference `(2b,)` float32; None without a reference.
    """

    policy: Tensor
    target: Tensor
    ref_error: Tensor | None


class ReferenceStrategy(ABC):
    """Where and when the reference's errors are made.

    Args:
        family: of the model.
        denoiser: the forward of policy and reference.
        sampler: how references generate.
        model: the network whose weights are the policy's, or in whose place a reference's can be put.
        config: of the run, its batches chosen.
    """

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        self._schedule = family.schedule
        self._denoiser = denoiser
        self._sampler = sampler
        self._model = model
        self._backend: Backend = config.train.backend
        self._round_trip = config.sampler.round_trip

    @abstractmethod
    def load_reference(self, references: ReferencePool, index: int) -> AbstractContextManager[nn.Module]:
        """A module with the weights of reference `index`, for the block and, online, until the next draw."""

    def sample(self, reference: nn.Module, noise: Tensor, conditioning: Conditioning, uncond: Conditioning) -> Tensor:
        """Samples of a reference `(B, *latent)` on the CPU, through pixels where the configuration says so.

        See `Denoiser.sample` and `Denoiser.through_pixels`.
        """
        samples = self._denoiser.sample(reference, self._sampler, noise, conditioning, uncond)
        return self._denoiser.through_pixels(samples) if self._round_trip else samples

    @property
    def device(self) -> torch.device:
        """Where policy and reference compute."""
        return self._denoiser.device

    @abstractmethod
    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> Tensor | None:
        """Errors `(2B,)` float32 on the CPU, winner half first; None where the learner's step makes them."""

    @abstractmethod
    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """The policy's prediction on a micro-batch, its target, and the reference's errors."""

    def _noised(self, pairs: Pairs) -> NoisedBatch:
        return noised(pairs, self._schedule, self._denoiser.device)


def predict_like_policy(denoiser: Denoiser, reference: nn.Module, batch: NoisedBatch) -> Tensor:
    """The reference's prediction, with autograd on although nothing is differentiated.

    Without it compiled code and attention kernels may differ, and equal weights must give equal errors bit for bit.
    """
    with torch.enable_grad():
        return denoiser.denoise(reference, *batch[:3]).detach()


class Precomputed(ReferenceStrategy):
    """In the rollout, in the learner's micro-batches, through the learner's forward, autograd included."""

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        super().__init__(family, denoiser, sampler, model, config)
        assert config.train.micro_batch is not None, "the micro-batch is chosen before"
        self._micro_batch = config.train.micro_batch
        self._aside = torch.device("cpu") if config.reference.park else None

    def load_reference(self, references: ReferencePool, index: int) -> AbstractContextManager[nn.Module]:
        """The one network, whose weights are the reference's meanwhile."""
        return references.resident(self._model, index, self._aside)

    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> Tensor:
        """See `ReferenceStrategy.ahead`."""
        halves = [self._errors(reference, batch).chunk(2) for batch in pairs().micro_batches(self._micro_batch)]
        return torch.cat([winner for winner, _ in halves] + [loser for _, loser in halves]).cpu()

    def _errors(self, reference: nn.Module, batch: Pairs) -> Tensor:
        """Of one micro-batch; its activations are freed on return."""
        shown = self._noised(batch)
        prediction = predict_like_policy(self._denoiser, reference, shown)
        return denoising_errors(prediction, shown.target, backend=self._backend)

    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """See `ReferenceStrategy`: one forward; the errors came with the pairs."""
        pairs = pairs.to(self._denoiser.device)
        shown = self._noised(pairs)
        return Predictions(self._denoiser.denoise(policy, *shown[:3]), shown.target, pairs.ref_error)


class SeparateForward(ReferenceStrategy):
    """A second module, a second forward; for a LoRA it shares the frozen weights, else it is a second network."""

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        super().__init__(family, denoiser, sampler, model, config)
        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self._reference = copy.deepcopy(model, frozen)
        self._bound = False

    @contextmanager
    def load_reference(self, references: ReferencePool, index: int) -> Iterator[nn.Module]:
        """The second module; it keeps the weights until the next draw."""
        if not self._bound:
            references.bind(self._reference)  # its own copies of the trained weights are free then
            self._bound = True
        references.load_into(self._reference, index)
        yield self._reference

    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> None:
        """Nothing: each step makes them."""
        return None

    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """See `ReferenceStrategy`: two forwards of the same noised pairs."""
        shown = self._noised(pairs)
        reference = predict_like_policy(self._denoiser, self._reference, shown)  # first: then its activations are gone
        errors = denoising_errors(reference, shown.target, backend=self._backend)
        return Predictions(self._denoiser.denoise(policy, *shown[:3]), shown.target, errors)


class JointForward(SeparateForward):
    """One forward of policy rows and reference rows, of which only the policy's are differentiated."""

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        super().__init__(family, denoiser, sampler, model, config)
        self._together = JointModel(model, self._reference, family.joint_parts(model))

    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """See `ReferenceStrategy` and `joint_forward`."""
        shown = self._noised(pairs)
        rows = len(shown.latents)
        latents, times = (torch.cat([part, part]) for part in shown[:2])
        with self._together.rows(rows):
            both = self._denoiser.denoise(policy, latents, times, shown.conditioning.repeat(2))
        errors = denoising_errors(both[rows:].detach(), shown.target, backend=self._backend)
        return Predictions(both[:rows], shown.target, errors)


REFERENCE_STRATEGIES: dict[str, type[ReferenceStrategy]] = {
    "ahead": Precomputed,
    "together": JointForward,
    "apart": SeparateForward,
}
