"""The parts of a run that a training method is built from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from seppo_fast.config.schema import Config
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.draws import Draws
from seppo_fast.methods.generation import Generation
from seppo_fast.methods.pairs import PairMaker
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.runs.signals import Interruption
from seppo_fast.scorers.scorer import Scorer


@dataclass(frozen=True)
class MethodParts:
    """The parts of a run that its method may use.

    Attributes:
        config: the run's configuration, with its batch sizes chosen.
        family: the loaded model.
        cache: latents and conditioning of the training data.
        denoiser: the forward pass that policy and references share.
        sampler: generates samples.
        model: the network that a reference's weights can be swapped into: the policy itself unless that is sharded.
        draws: chooses the past policy that is an update's reference.
        processes: the run's processes.
        interruption: call its `check` between two batches of work, so that a signal can end the run there.
        judge: the scorer that `reference.judge` or `rl.reward` names; None without one.
    """

    config: Config
    family: Family
    cache: LatentCache
    denoiser: Denoiser
    sampler: Sampler
    model: nn.Module
    draws: Draws
    processes: Processes
    interruption: Interruption
    judge: Scorer | None = None

    def pair_maker(self) -> PairMaker:
        """Returns a maker of this process's share of each update's pairs."""
        rank, world = self.processes.rank, self.processes.world
        return PairMaker(self.config, self.cache, self.family.schedule, rank=rank, world=world)

    def generation(self) -> Generation:
        """Returns what generates this process's samples in batches."""
        return Generation(self.config, self.processes, self.interruption)
