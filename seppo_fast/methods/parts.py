"""What a run hands to its method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from seppo_fast.config.schema import Config
from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.draws import Draws
from seppo_fast.methods.pairs import PairMaker
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.runs.signals import Interruption


@dataclass(frozen=True)
class MethodParts:
    """The run, as far as a method may use it.

    Attributes:
        config: the run's configuration, its batches chosen.
        family: the model.
        cache: the data.
        denoiser: the one forward of policy and references.
        sampler: how samples are made.
        model: the network in which a reference's weights can be put, the policy itself where it is not in shards.
        draws: which past policy is the reference.
        processes: those of the run.
        interruption: to be asked between two batches of work.
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

    def pair_maker(self) -> PairMaker:
        """Returns what makes an update's pairs, this process's share of them."""
        rank, world = self.processes.rank, self.processes.world
        return PairMaker(self.config, self.cache, self.family.schedule, rank=rank, world=world)
