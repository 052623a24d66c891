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

import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.loss import Backend, denoising_errors
from seppo_fast.methods.forward import Forward, Noised
from seppo_fast.methods.joint_forward import Together
from seppo_fast.methods.pairs import Pairs
from seppo_fast.references.pool import ReferencePool


class ReferenceErrors(ABC):
    """What the rollout and the learner ask."""

    @abstractmethod
    def drawn(self, references: ReferencePool, index: int) -> AbstractContextManager[nn.Module]:
        """A module with the weights of reference `index`, for the block and, online, until the next draw."""

    @abstractmethod
    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> Tensor | None:
        """Errors `(2B,)` float32 on the CPU, winner half first; None where the learner's step makes them."""

    @abstractmethod
    def __call__(self, policy: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor | None]:
        """The policy's prediction and its target, as `Forward`, and errors `(2b,)`; None without a reference."""


def as_the_policy(forward: Forward, reference: nn.Module, noised: Noised) -> Tensor:
    """The reference's prediction, with autograd on although nothing is differentiated.

    Without it compiled code and attention kernels may differ, and equal weights must give equal errors bit for bit.
    """
    with torch.enable_grad():
        return forward.denoise(reference, *noised[:3]).detach()


class Ahead(ReferenceErrors):
    """In the rollout, in the learner's micro-batches, through the learner's forward, autograd included.

    Args:
        forward: of policy and reference.
        unet: the policy, which is the reference while one is resident.
        config: of the run, its batches chosen.
    """

    def __init__(self, forward: Forward, unet: nn.Module, config: Config) -> None:
        assert config.train.micro_batch is not None, "the micro-batch is chosen before"
        self._forward = forward
        self._unet = unet
        self._micro_batch = config.train.micro_batch
        self._backend: Backend = config.train.backend
        self._aside = torch.device("cpu") if config.reference.park else None

    def drawn(self, references: ReferencePool, index: int) -> AbstractContextManager[nn.Module]:
        """The one UNet, whose weights are the reference's meanwhile."""
        return references.resident(self._unet, index, self._aside)

    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> Tensor:
        """See `ReferenceErrors.ahead`."""
        halves = [self._errors(reference, batch).chunk(2) for batch in pairs().micro_batches(self._micro_batch)]
        return torch.cat([winner for winner, _ in halves] + [loser for _, loser in halves]).cpu()

    def _errors(self, reference: nn.Module, batch: Pairs) -> Tensor:
        """Of one micro-batch; its activations are freed on return."""
        noised = self._forward.noised(batch)
        prediction = as_the_policy(self._forward, reference, noised)
        return denoising_errors(prediction, noised.target, backend=self._backend)

    def __call__(self, policy: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ReferenceErrors`: one forward; the errors came with the pairs."""
        pairs = pairs.to(self._forward.device)
        prediction, target = self._forward(policy, pairs)
        return prediction, target, pairs.ref_error


class Apart(ReferenceErrors):
    """A second module, a second forward. For a LoRA it shares the frozen weights; for full weights it is a second UNet.

    Args:
        forward: of policy and reference.
        unet: the policy.
        config: of the run.
    """

    def __init__(self, forward: Forward, unet: nn.Module, config: Config) -> None:
        self._forward = forward
        self._backend: Backend = config.train.backend
        frozen = {id(weight): weight for weight in unet.parameters() if not weight.requires_grad}
        self._reference = copy.deepcopy(unet, frozen)
        self._bound = False

    @contextmanager
    def drawn(self, references: ReferencePool, index: int) -> Iterator[nn.Module]:
        """The second module; it keeps the weights until the next draw."""
        if not self._bound:
            references.bind(self._reference)  # its own copies of the trained weights are free then
            self._bound = True
        references.load_into(self._reference, index)
        yield self._reference

    def ahead(self, reference: nn.Module, pairs: Callable[[], Pairs]) -> None:
        """Nothing: each step makes them."""
        return None

    def __call__(self, policy: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ReferenceErrors`: two forwards of the same noised pairs."""
        noised = self._forward.noised(pairs)
        reference = as_the_policy(self._forward, self._reference, noised)  # first: then its activations are gone
        errors = denoising_errors(reference, noised.target, backend=self._backend)
        return self._forward.denoise(policy, *noised[:3]), noised.target, errors


class Shared(Apart):
    """One forward of policy rows and reference rows, of which only the policy's are differentiated; see `together`."""

    def __init__(self, forward: Forward, unet: nn.Module, config: Config) -> None:
        super().__init__(forward, unet, config)
        self._together = Together(unet, self._reference)

    def __call__(self, policy: nn.Module, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `ReferenceErrors`."""
        noised = self._forward.noised(pairs)
        rows = len(noised.latents)
        twice = [torch.cat([part, part]) for part in noised[:3]]
        with self._together.rows(rows):
            both = self._forward.denoise(policy, *twice)
        errors = denoising_errors(both[rows:].detach(), noised.target, backend=self._backend)
        return both[:rows], noised.target, errors


WAYS: dict[str, type[Ahead] | type[Apart]] = {"ahead": Ahead, "together": Shared, "apart": Apart}
