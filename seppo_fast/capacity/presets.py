"""`memory = low | balanced | fast` fills in what a configuration leaves null.

Nothing here changes what is computed, but for rounding: batches, recomputation, compilation, attention kernels. What
was chosen stands in the run's `config.yaml`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seppo_fast.capacity.batches import MEMORY_PRESETS, BatchRoom, measures_halves
from seppo_fast.capacity.footprint import Footprint, sampling_footprint, training_footprint
from seppo_fast.config.schema import Config
from seppo_fast.distributed.fsdp import sharding_asked
from seppo_fast.distributed.processes import Processes
from seppo_fast.models.family import Family
from seppo_fast.models.trainable import DTYPES, trainable
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.tiers import SHARES
from seppo_fast.utils.memory import free_bytes


def apply_preset(config: Config, device: torch.device) -> Config:
    """Fills in what must be known before the model is made: recomputation, compilation, the learning rate."""
    setting = MEMORY_PRESETS[config.memory]
    model: dict[str, Any] = {}
    if config.model.gradient_checkpointing is None:
        model["gradient_checkpointing"] = setting.checkpointing
    if config.model.compile is None:
        ahead = config.reference.errors == "ahead"
        model["compile"] = setting.compile and device.type == "cuda" and ahead
    return filled(config, model=model, train={"learning_rate": config.learning_rate})


def fit_to_device(config: Config, family: Family, processes: Processes) -> Config:
    """Fills in the pool's place on a GPU, batches, parking and attention, which take model and machine to know.

    Args:
        config: of the run, through `apply_preset`.
        family: its network on its device, its trained weights marked.
        processes: all take the smallest batches of any, and the attention that the first one measured.

    Raises:
        ConfigError: attention that is asked for and does not work.
    """
    model = family.model
    circumstances: dict[str, Any] = {
        "denoise": family.denoise,
        "inputs": family.example_inputs(config.data.resolution),
        "dtype": DTYPES[config.model.precision],
        "device": processes.device,
    }
    if config.reference.gpu_gib is None and processes.device.type == "cuda":
        config = _with_pool(config, model, processes)
    if config.train.micro_batch is None:
        rows = _room(config, model, processes).micro_batch(config, training_footprint(model, **circumstances))
        config = filled(config, train={"micro_batch": processes.min(rows)})
    if config.reference.park is None and (MEMORY_PRESETS[config.memory].park or processes.device.type != "cuda"):
        config = filled(config, reference={"park": MEMORY_PRESETS[config.memory].park})  # on a CPU it moves nothing
    guided = config.sampler.guidance > 1
    if config.sampler.batch is None or config.reference.park is None:
        sample = sampling_footprint(model, **circumstances, guided=guided)
        config = _with_batch(config, model, sample, processes)
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
        device=processes.device,
        dtype=circumstances["dtype"],
        forwards=evaluations / (2 * config.reference.uses) + (1 if objective.draw else 0),
    )
    return filled(config, model={"attention": processes.first(attention)})


def _with_pool(config: Config, model: nn.Module, processes: Processes) -> Config:
    slab = PackedLayout.of(model, DTYPES[config.model.precision]).size
    most = int(SHARES["device"] * free_bytes(processes.device)) // slab
    return filled(config, reference={"gpu_gib": processes.min(min(most, checkpoints(config))) * slab / 2**30})


def _room(config: Config, model: nn.Module, processes: Processes) -> BatchRoom:
    """What this process has for batches, its weights on the device already."""
    free = free_bytes(processes.device)
    shards = processes.world if sharding_asked() else 1
    average = trained_bytes(model) if config.train.ema_decay else 0
    cpu = processes.device.type == "cpu"
    return BatchRoom(
        budget=int(MEMORY_PRESETS[config.memory].share * free),
        moments=learner_bytes(config, model, shards) - average // shards,
        average=average // shards,
        references=pool_bytes(config, model, processes.device, free),
        cpu=cpu,
        world=processes.world,
        aside=trained_bytes(model) // shards if cpu and measures_halves(config) else 0,
    )


def _with_batch(config: Config, model: nn.Module, sample: Footprint, processes: Processes) -> Config:
    room = _room(config, model, processes)
    park, batch = config.reference.park, config.sampler.batch
    if park is None:
        park = any(processes.any(room.parks(config, sample)))
    if batch is None:
        batch = processes.min(room.batch(config, sample, park))
    return filled(config, sampler={"batch": batch}, reference={"park": park})


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
    slab = PackedLayout.of(model, DTYPES[config.model.precision]).size
    # On a CPU host memory is the device's; unless a budget is given, the pool takes half of it at most.
    cuda = device.type == "cuda"
    given = config.reference.gpu_gib if cuda else config.reference.host_gib
    share = SHARES["device" if cuda else "host"]
    kept = min(count * slab, int(share * free) // slab * slab if given is None else int(given * 2**30))
    comes_up = device.type == "cuda" and kept < count * slab and not config.reference.park
    return kept + slab + (slab if comes_up else 0)


def learner_bytes(config: Config, model: nn.Module, shards: int = 1) -> int:
    """Of what the learner adds to the weights and their gradients: Adam's two moments, the moving average."""
    moments = 0.5 if config.train.optimizer == "adamw8bit" else 2
    return int(trained_bytes(model) * (moments + (1 if config.train.ema_decay else 0)) / shards)


def filled(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with keys of its sections set."""
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items() if keys}
    return config.model_copy(update=changed)
