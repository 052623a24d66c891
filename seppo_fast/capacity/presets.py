"""The dial: `memory = low | balanced | fast` fills in what a configuration leaves null.

Nothing here changes what is computed, but for rounding: batches, recomputation, compilation, attention kernels. What
was chosen stands in the run's `config.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from seppo_fast.capacity.footprint import Footprint, sampling_footprint, training_footprint
from seppo_fast.config.schema import Config
from seppo_fast.distributed.fsdp import sharding_asked
from seppo_fast.models.family import Family
from seppo_fast.models.trainable import DTYPES, trainable
from seppo_fast.references.layout import Table
from seppo_fast.utils.memory import free_bytes


@dataclass(frozen=True)
class Setting:
    """What one position of the dial stands for.

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


DIAL = {
    "low": Setting(share=0.5, micro_batch=1, batch=8, park=True, checkpointing=True, compile=False),
    "balanced": Setting(share=0.7, micro_batch=16, batch=64, park=False, checkpointing=False, compile=False),
    "fast": Setting(share=0.9, micro_batch=32, batch=128, park=False, checkpointing=False, compile=True),
}
# Beside the optimizer's state at least so many samples should fit, or the state is parked.
FEW_SAMPLES = 16
# Of a GPU's free memory, for past policies.
_POOL_SHARE = 0.15
# A CPU is busy with a few rows; more only leave its caches.
CPU_ROWS = 32


def turn_dial(config: Config, device: torch.device) -> Config:
    """Fills in what must be known before the model is made: recomputation and compilation."""
    setting = DIAL[config.memory]
    model: dict[str, Any] = {}
    if config.model.gradient_checkpointing is None:
        model["gradient_checkpointing"] = setting.checkpointing
    if config.model.compile is None:
        ahead = config.reference.errors == "ahead"
        model["compile"] = setting.compile and device.type == "cuda" and ahead
    return filled(config, model=model)


def fit_to_machine(config: Config, family: Family, accelerator: Accelerator) -> Config:
    """Fills in the pool's place on a GPU, batches, parking and attention, which take model and machine to know.

    Args:
        config: of the run, through `turn_dial`.
        family: its network on its device, its trained weights marked.
        accelerator: all processes take the smallest batches of any, and the attention that the first one measured.

    Raises:
        ConfigError: attention that is asked for and does not work.
    """
    model = family.model
    circumstances: dict[str, Any] = {
        "denoise": family.denoise,
        "inputs": family.example_inputs(config.data.resolution),
        "dtype": DTYPES[config.model.precision],
        "device": accelerator.device,
    }
    if config.reference.gpu_gib is None and accelerator.device.type == "cuda":
        config = _with_pool(config, model, accelerator)
    if config.train.micro_batch is None:
        config = _with_micro_batch(config, model, training_footprint(model, **circumstances), accelerator)
    if config.reference.park is None and (DIAL[config.memory].park or accelerator.device.type != "cuda"):
        config = filled(config, reference={"park": DIAL[config.memory].park})  # on a CPU it moves nothing
    guided = config.sampler.guidance > 1
    if config.sampler.batch is None or config.reference.park is None:
        sample = sampling_footprint(model, **circumstances, guided=guided)
        config = _with_batch(config, model, sample, accelerator)
    assert config.train.micro_batch is not None
    objective = config.row
    evaluations = config.sampler.steps * (2 if guided else 1) if objective.negatives == "generated" else 0

    def call(model: nn.Module, rows: int) -> None:
        family.denoise(model, *circumstances["inputs"](rows))

    attention = family.choose_attention(
        "sdpa" if config.model.deterministic else config.model.attention,
        model,
        call=call,
        rows=2 * config.train.micro_batch,
        device=accelerator.device,
        dtype=circumstances["dtype"],
        forwards=evaluations / (2 * config.reference.uses) + (1 if objective.draw else 0),
    )
    (attention,) = broadcast_object_list([attention])
    return filled(config, model={"attention": attention})


def _with_pool(config: Config, model: nn.Module, accelerator: Accelerator) -> Config:
    slab = Table.of(model, DTYPES[config.model.precision]).size
    most = int(_POOL_SHARE * free_bytes(accelerator.device)) // slab
    mine = torch.tensor([min(most, checkpoints(config))], device=accelerator.device)
    return filled(config, reference={"gpu_gib": int(accelerator.gather(mine).min()) * slab / 2**30})


def _with_micro_batch(config: Config, model: nn.Module, footprint: Footprint, accelerator: Accelerator) -> Config:
    setting = DIAL[config.memory]
    pool = pool_bytes(config, model, accelerator.device, free_bytes(accelerator.device))
    beside = learner_bytes(config, model, _shards(accelerator)) + pool
    most = min(setting.micro_batch, -(-config.train.pairs_per_update // accelerator.num_processes))
    return filled(config, train={"micro_batch": _fitting(setting, footprint, beside, most, accelerator)})


def _with_batch(config: Config, model: nn.Module, footprint: Footprint, accelerator: Accelerator) -> Config:
    setting = DIAL[config.memory]
    average = trained_bytes(model) if config.train.ema_decay else 0
    pool = pool_bytes(config, model, accelerator.device, free_bytes(accelerator.device))
    beside = learner_bytes(config, model, _shards(accelerator)) + pool
    most = config.sampler.batch or setting.batch
    park = config.reference.park
    if park is None:
        park = _fitting(setting, footprint, beside, most, accelerator) < min(most, FEW_SAMPLES)
    batch = config.sampler.batch
    if batch is None:
        batch = _fitting(setting, footprint, average + pool if park else beside, most, accelerator)
    return filled(config, sampler={"batch": batch}, reference={"park": park})


def _fitting(setting: Setting, footprint: Footprint, beside: int, most: int, accelerator: Accelerator) -> int:
    """At least 1: whether one row fits is better found out by trying than refused on an estimate."""
    device = accelerator.device
    if device.type == "cpu":
        most = min(most, CPU_ROWS)
    rows = max(1, footprint.largest(int(setting.share * free_bytes(device)) - beside, most))
    return int(accelerator.gather(torch.tensor([rows], device=device)).min())


def trained_bytes(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in trainable(model).values())


def checkpoints(config: Config) -> int:
    """Past policies that a run keeps at its end."""
    draw = config.row.draw
    if draw in (None, "initial"):
        return 1 if draw else 0
    made = -(-config.train.updates // config.train.updates_per_iteration)
    return min(made, 2 if draw == "newest" else config.reference.keep or made)


def pool_bytes(config: Config, model: nn.Module, device: torch.device, free: int) -> int:
    """Of the device's memory, of which `free` bytes are for a run: past policies there, the resident one, the next."""
    count = checkpoints(config)
    if not count:
        return 0
    slab = Table.of(model, DTYPES[config.model.precision]).size
    # On a CPU host memory is the device's; unless a budget is given, the pool takes half of it at most.
    cuda = device.type == "cuda"
    given = config.reference.gpu_gib if cuda else config.reference.host_gib
    share = _POOL_SHARE if cuda else 0.5
    kept = min(count * slab, int(share * free) // slab * slab if given is None else int(given * 2**30))
    comes_up = device.type == "cuda" and kept < count * slab and not config.reference.park
    return kept + slab + (slab if comes_up else 0)


def _shards(accelerator: Accelerator) -> int:
    return accelerator.num_processes if sharding_asked() else 1


def learner_bytes(config: Config, model: nn.Module, shards: int = 1) -> int:
    """Of what the learner adds to the weights and their gradients: Adam's two moments, the moving average."""
    moments = 0.5 if config.train.optimizer == "adamw8bit" else 2
    return int(trained_bytes(model) * (moments + (1 if config.train.ema_decay else 0)) / shards)


def filled(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with keys of its sections set."""
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items() if keys}
    return config.model_copy(update=changed)
