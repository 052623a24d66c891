"""The rule by which batches and parking are chosen: for a run, for `check`, and for what an error message suggests."""

from __future__ import annotations

from dataclasses import dataclass

from seppo_fast.capacity.footprint import Footprint
from seppo_fast.config.schema import Config

# Beside the optimizer's state at least so many samples should fit, or the state is parked.
FEW_SAMPLES = 16
# A CPU is busy with a few rows; more only leave its caches.
CPU_ROWS = 32


@dataclass(frozen=True)
class Preset:
    """What one value of `memory` stands for.

    Attributes:
        share: of the free memory that a batch may fill.
        micro_batch: pairs, at most.
        batch: samples, at most.
        park: optimizer and policy wait in host memory during a rollout, whether or not memory asks for it.
        checkpointing: recompute activations.
        compile: the repeated blocks, on a GPU.
    """

    share: float
    micro_batch: int
    batch: int
    park: bool
    checkpointing: bool
    compile: bool


MEMORY_PRESETS = {
    "low": Preset(share=0.5, micro_batch=1, batch=8, park=True, checkpointing=True, compile=False),
    "balanced": Preset(share=0.7, micro_batch=16, batch=64, park=False, checkpointing=False, compile=False),
    "fast": Preset(share=0.9, micro_batch=32, batch=128, park=False, checkpointing=False, compile=True),
}


def measures_halves(config: Config) -> bool:
    """Whether a run measures the gradients of winners and losers now and then."""
    return bool(config.log.health_every) and config.row.negatives is not None


@dataclass(frozen=True)
class BatchRoom:
    """Bytes of a device that batches may fill, and what is beside them.

    Attributes:
        budget: bytes for batches and for what follows here; the network's weights are not in it.
        moments: of the optimizer, in this process.
        average: of the moving average.
        references: of the past policies that stay on the device.
        cpu: whether the device is a CPU.
        world: processes that share an update's pairs.
        aside: of the gradient that `log.health_every` puts aside while learning.
    """

    budget: int
    moments: int
    average: int
    references: int
    cpu: bool
    world: int = 1
    aside: int = 0

    def micro_batch(self, config: Config, pair: Footprint) -> int:
        """Returns the largest micro-batch that fits, as large as the preset allows."""
        most = min(MEMORY_PRESETS[config.memory].micro_batch, -(-config.train.pairs_per_update // self.world))
        return self._fitting(pair, most, parked=False, more=self.aside)

    def parks(self, config: Config, sample: Footprint) -> bool:
        """Returns whether the optimizer's state has to wait in host memory: too few samples fit beside it."""
        most = self._most_samples(config)
        return MEMORY_PRESETS[config.memory].park or self._fitting(sample, most, False) < min(most, FEW_SAMPLES)

    def batch(self, config: Config, sample: Footprint, parked: bool) -> int:
        """Returns the largest batch of samples that fits, as large as the preset allows."""
        return self._fitting(sample, self._most_samples(config), parked)

    def _most_samples(self, config: Config) -> int:
        most = config.sampler.batch or MEMORY_PRESETS[config.memory].batch
        return min(most, CPU_ROWS) if self.cpu else most

    def _fitting(self, footprint: Footprint, most: int, parked: bool, more: int = 0) -> int:
        """At least 1: whether one row fits is better found out by trying than refused on an estimate."""
        beside = self.average + self.references + more + (0 if parked else self.moments)
        return max(1, footprint.largest(self.budget - beside, min(most, CPU_ROWS) if self.cpu else most))
