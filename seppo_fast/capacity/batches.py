"""The rule that chooses batch sizes and parking; runs, `check` and the suggestions in error messages all use it."""

from __future__ import annotations

from dataclasses import dataclass

from seppo_fast.capacity.footprint import Footprint
from seppo_fast.capacity.work import rows_per_update
from seppo_fast.config.schema import Config

# The optimizer's state is parked if fewer samples than this fit beside it.
FEW_SAMPLES = 16
# A few rows keep a CPU busy; more only overflow its caches.
CPU_ROWS = 32


@dataclass(frozen=True)
class Preset:
    """What one value of the key `memory` means.

    Attributes:
        share: the share of free memory that a batch may fill.
        micro_batch: the largest micro-batch, in rows (pairs).
        batch: the largest sampling batch, in samples.
        park: whether to move optimizer state and policy to host memory during every rollout, even if memory suffices.
        checkpointing: whether to recompute activations.
        compile: whether to compile the repeated blocks on a GPU.
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


@dataclass(frozen=True)
class BatchRoom:
    """The memory of a device that batches may fill, and what else occupies it.

    Attributes:
        budget: bytes for batches and for the items below; it excludes the network's weights.
        moments: bytes of the optimizer's moments in this process.
        average: bytes of the moving average.
        references: bytes of the past policies that stay on the device.
        cpu: whether the device is a CPU.
        world: number of processes that share an update's pairs.
        aside: bytes of the winners' gradient that `log.health_every` stores while learning.
    """

    budget: int
    moments: int
    average: int
    references: int
    cpu: bool
    world: int = 1
    aside: int = 0

    def micro_batch(self, config: Config, pair: Footprint) -> int:
        """Returns the largest micro-batch that fits and that the preset allows, of whole blocks and at least one."""
        most = min(MEMORY_PRESETS[config.memory].micro_batch, -(-rows_per_update(config) // self.world))
        rows = self._fitting(pair, most, parked=False, more=self.aside)
        return max(config.block, rows - rows % config.block)

    def parks(self, config: Config, sample: Footprint) -> bool:
        """Returns whether to park the optimizer's state: the preset says so, or too few samples fit beside it."""
        most = self._most_samples(config)
        return MEMORY_PRESETS[config.memory].park or self._fitting(sample, most, False) < min(most, FEW_SAMPLES)

    def batch(self, config: Config, sample: Footprint, parked: bool) -> int:
        """Returns the largest batch of samples that fits and that the preset allows."""
        return self._fitting(sample, self._most_samples(config), parked)

    def _most_samples(self, config: Config) -> int:
        most = config.sampler.batch or MEMORY_PRESETS[config.memory].batch
        return min(most, CPU_ROWS) if self.cpu else most

    def _fitting(self, footprint: Footprint, most: int, parked: bool, more: int = 0) -> int:
        """Returns how many rows fit, but at least 1: trying one row beats refusing it because of an estimate."""
        beside = self.average + self.references + more + (0 if parked else self.moments)
        return max(1, footprint.largest(self.budget - beside, min(most, CPU_ROWS) if self.cpu else most))
