"""Three ways to compute the reference's errors on a pair's two noised halves, behind one interface.

`ahead`: during the rollout, with the reference's weights in place of the policy's; the learner holds no reference.
`apart`: in each step, by a second forward of a second module beside the policy.
`together`: in each step, by one forward of a batch with rows of both; only for a LoRA, whose frozen weights both share.
All three reduce the errors alike, so they train to the same weights; `together` differs by rounding, if a shared batch
rounds differently.
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
    """The inputs of the loss for b noised pairs, winner half first.

    Attributes:
        policy: the policy's prediction, in the shape of the noised latents.
        target: the regression target; see `NoisedBatch`.
        ref_error: `(2b,)` float32 denoising errors of the reference; None without a reference.
    """

    policy: Tensor
    target: Tensor
    ref_error: Tensor | None


class ReferenceStrategy(ABC):
    """Interface for generating a reference's samples and computing its denoising errors.

    Args:
        family: the loaded model.
        denoiser: the forward pass that policy and reference share.
        sampler: generates the reference's samples.
        model: the network that a reference's weights can be swapped into: the policy itself unless that is sharded.
        config: the run's configuration, with its batch sizes chosen.
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
        """Returns a context with a module that has the weights of reference `index` inside the block.

        If the errors are computed in each step, the module keeps the weights until the next draw.
        """

    def sample(self, reference: nn.Module, noise: Tensor, conditioning: Conditioning, uncond: Conditioning) -> Tensor:
        """Generates samples `(B, *latent)` of a reference, on the CPU; with `sampler.round_trip`, through pixels.

        See `Denoiser.sample` and `Denoiser.through_pixels`.
        """
        samples = self._denoiser.sample(reference, self._sampler, noise, conditioning, uncond)
        return self._denoiser.through_pixels(samples) if self._round_trip else samples

    @property
    def device(self) -> torch.device:
        """The device on which policy and reference compute."""
        return self._denoiser.device

    @abstractmethod
    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> Tensor | None:
        """Returns errors `(2B,)` float32 on the CPU, winner half first; None if the learner's step computes them.

        Without losers there are B.
        """

    @abstractmethod
    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """Returns the policy's prediction on a micro-batch, its target, and the reference's errors."""

    def _noised(self, pairs: Pairs) -> NoisedBatch:
        return noised(pairs, self._schedule, self._denoiser.device)


def predict_like_policy(denoiser: Denoiser, reference: nn.Module, batch: NoisedBatch) -> Tensor:
    """Returns the reference's prediction, computed with autograd on although nothing is differentiated.

    Without autograd, different compiled code and attention kernels may run, but equal weights must give equal errors
    bit for bit.
    """
    with torch.enable_grad():
        return denoiser.denoise(reference, *batch[:3]).detach()


class Precomputed(ReferenceStrategy):
    """Computes the errors in the rollout, in the learner's micro-batches and by its forward, autograd included."""

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        super().__init__(family, denoiser, sampler, model, config)
        assert config.train.micro_batch is not None, "train.micro_batch must be chosen by now"
        self._micro_batch = config.train.micro_batch
        self._aside = torch.device("cpu") if config.reference.park else None

    def load_reference(self, references: ReferencePool, index: int) -> AbstractContextManager[nn.Module]:
        """Returns a context with the one network, which has the reference's weights inside the block."""
        return references.resident(self._model, index, self._aside)

    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> Tensor:
        """See `ReferenceStrategy.ahead`."""
        made = pairs()
        errors = [self._errors(reference, batch) for batch in made.micro_batches(self._micro_batch)]
        if made.losers is None:
            return torch.cat(errors).cpu()
        halves = [both.chunk(2) for both in errors]
        return torch.cat([winner for winner, _ in halves] + [loser for _, loser in halves]).cpu()

    def _errors(self, reference: nn.Module, batch: Pairs) -> Tensor:
        """Returns the errors of one micro-batch; its activations are freed on return."""
        shown = self._noised(batch)
        prediction = predict_like_policy(self._denoiser, reference, shown)
        return denoising_errors(prediction, shown.target, backend=self._backend)

    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """Runs one forward; the reference's errors came with the pairs. See `ReferenceStrategy`."""
        pairs = pairs.to(self._denoiser.device)
        shown = self._noised(pairs)
        return Predictions(self._denoiser.denoise(policy, *shown[:3]), shown.target, pairs.ref_error)


class SeparateForward(ReferenceStrategy):
    """Computes the errors in each step, by a second forward of a second module.

    With a LoRA the second module shares the policy's frozen weights; with full weights it is a second network.
    """

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        super().__init__(family, denoiser, sampler, model, config)
        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self._reference = copy.deepcopy(model, frozen)
        self._bound = False

    @contextmanager
    def load_reference(self, references: ReferencePool, index: int) -> Iterator[nn.Module]:
        """Yields the second module, which keeps the reference's weights until the next draw."""
        if not self._bound:
            references.bind(self._reference)  # which frees its own copies of the trained weights
            self._bound = True
        references.load_into(self._reference, index)
        yield self._reference

    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> None:
        """Returns None: each step computes the errors."""
        return None

    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """Runs two forwards of the same noised pairs. See `ReferenceStrategy`."""
        shown = self._noised(pairs)
        # First, so that its activations are freed before the policy's forward.
        reference = predict_like_policy(self._denoiser, self._reference, shown)
        errors = denoising_errors(reference, shown.target, backend=self._backend)
        return Predictions(self._denoiser.denoise(policy, *shown[:3]), shown.target, errors)


class JointForward(SeparateForward):
    """Computes the errors in each step, by one forward of rows of both, of which only the policy's have gradients."""

    def __init__(self, family: Family, denoiser: Denoiser, sampler: Sampler, model: nn.Module, config: Config) -> None:
        super().__init__(family, denoiser, sampler, model, config)
        self._together = JointModel(model, self._reference, family.joint_parts(model))

    def predictions(self, policy: nn.Module, pairs: Pairs) -> Predictions:
        """Runs one forward of both. See `ReferenceStrategy` and `joint_forward`."""
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
