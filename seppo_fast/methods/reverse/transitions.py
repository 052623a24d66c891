"""Transitions: rows of steps of the reverse process, on which a policy trains.

Shape legend: B rows, b rows of a micro-batch, h predictions a row (2 if a row compares two samples), k pseudo-targets a
prediction (2 if a row compares two candidates of one step), * the shape of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.steps import Step
from seppo_fast.methods.pairs import sent


@dataclass(frozen=True)
class StepRows:
    """A micro-batch of rows, on the device.

    Attributes:
        count: number of rows that count; 0 for a spare row, see `Transitions`.
        latents: `(bh, *latent)` x_t, the h predictions of a row one after the other.
        times: `(bh,)`.
        conditioning: bh rows.
        uncond: one row, for the empty prompt.
        targets: `(k, bh, *latent)` pseudo-targets; see `seppo_fast.diffusion.steps`.
        kappa: `(b,)` the steps' kappa.
        step: `(b,)` the steps' indices, from 0.
        advantage: `(b,)` what each row teaches: an advantage, or the sign of a preference.
        old_error: `(hk, b)` errors of an earlier policy; None if that policy is the one being trained.
        reference: `(bh, *latent)` predictions of the initial policy; None without it.
    """

    count: int
    latents: Tensor
    times: Tensor
    conditioning: Conditioning
    uncond: Conditioning
    targets: Tensor
    kappa: Tensor
    step: Tensor
    advantage: Tensor
    old_error: Tensor | None
    reference: Tensor | None

    def __len__(self) -> int:
        return self.count


@dataclass
class Transitions:
    """This process's rows of an update.

    A row refers to latents in `store`, of which micro-batches are made when they are needed, so that latents are kept
    once. A process without rows has one spare row that does not count, so that all processes run the same code.

    Attributes:
        sample_ids: the id of each row.
        total: number of rows of the update that count, over all processes.
        store: `(M, *latent)` float32 on the CPU.
        now: `(B, h)` the places of x_t in the store.
        following: `(B, h, k)` the places of the latents after the step.
        step: `(B,)` the steps' indices.
        steps: the sampler's steps.
        examples: `(B, h)` the prompts' examples.
        advantage: `(B,)` float32.
        conditioning: returns the conditioning of examples, one row each; None stands for the empty prompt.
        device: where micro-batches go.
        spare: whether the only row does not count.
        old_error: `(hk, B)` float32 on the CPU; see `StepRows`.
        reference: `(B, h, *latent)` float32 on the CPU; see `StepRows`.
    """

    sample_ids: tuple[int, ...]
    total: int
    store: Tensor
    now: Tensor
    following: Tensor
    step: Tensor
    steps: tuple[Step, ...]
    examples: Tensor
    advantage: Tensor
    conditioning: Callable[[Sequence[int | None]], Conditioning]
    device: torch.device
    spare: bool = False
    old_error: Tensor | None = field(default=None)
    reference: Tensor | None = field(default=None)

    def __len__(self) -> int:
        return 0 if self.spare else len(self.sample_ids)

    def micro_batches(self, size: int) -> Iterator[StepRows]:
        """Yields consecutive micro-batches of at most `size` rows."""
        for start in range(0, len(self.sample_ids), size):
            yield self._rows(slice(start, start + size))

    def _rows(self, chosen: slice) -> StepRows:
        numbers = self.step[chosen].tolist()
        steps = [self.steps[number] for number in numbers]
        halves = self.now.shape[1]
        each = [step for step in steps for _ in range(halves)]
        # A spare row's gradient is multiplied by 0, which would not remove a value that is not finite.
        store = torch.zeros_like(self.store[:1]).expand_as(self.store) if self.spare else self.store
        latents = store[self.now[chosen].flatten()]
        following = self.following[chosen].flatten(0, 1)
        targets = [self._targets(each, latents, store[places]) for places in following.unbind(1)]
        conditioning = self.conditioning([None, *self.examples[chosen].flatten().tolist()])
        conditioning = conditioning.map(lambda tensor: sent(tensor, self.device))
        return StepRows(
            count=0 if self.spare else len(steps),
            latents=sent(latents, self.device),
            times=sent(torch.tensor([step.timestep for step in each]), self.device),
            conditioning=conditioning.take(slice(1, None)),
            uncond=conditioning.take(slice(0, 1)),
            targets=sent(torch.stack(targets), self.device),
            kappa=sent(torch.tensor([step.kappa for step in steps]), self.device),
            step=sent(self.step[chosen], self.device),
            advantage=sent(self.advantage[chosen], self.device),
            old_error=None if self.old_error is None else sent(self.old_error[:, chosen], self.device),
            reference=None if self.reference is None else sent(self.reference[chosen].flatten(0, 1), self.device),
        )

    @staticmethod
    def _targets(steps: list[Step], latents: Tensor, following: Tensor) -> Tensor:
        made = [step.pseudo_target(x, ahead) for step, x, ahead in zip(steps, latents, following, strict=True)]
        return torch.stack(made)
