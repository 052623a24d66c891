"""Fills in the settings that a configuration leaves null, according to `memory = low | balanced | fast`.

These are batches, parking, recomputation, compilation and attention kernels; results differ by rounding only. The
choices are saved in the run's `config.yaml`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seppo_fast.capacity.batches import MEMORY_PRESETS, BatchRoom
from seppo_fast.capacity.footprint import Footprint, sampling_footprint, training_footprint
from seppo_fast.capacity.work import forwards, measures_halves, network_rows
from seppo_fast.config.schema import Config
from seppo_fast.distributed.fsdp import sharding_asked
from seppo_fast.distributed.processes import Processes
from seppo_fast.models.family import Family
from seppo_fast.models.trainable import DTYPES, trainable
from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.tiers import SHARES
from seppo_fast.utils.memory import free_bytes


def apply_preset(config: Config, device: torch.device) -> Config:
    """Fills in what must be known before the model is created: recomputation, compilation, the learning rate."""
    setting = MEMORY_PRESETS[config.memory]
    model: dict[str, Any] = {}
    if config.model.gradient_checkpointing is None:
        model["gradient_checkpointing"] = setting.checkpointing
    if config.model.compile is None:
        ahead = config.reference.errors == "ahead"
        model["compile"] = setting.compile and device.type == "cuda" and ahead
    return filled(config, model=model, train={"learning_rate": config.learning_rate})


def fit_to_device(config: Config, family: Family, processes: Processes) -> Config:
    """Fills in what depends on model and machine: GPU memory for the pool, batches, parking and attention.

    Args:
        config: the run's configuration, after `apply_preset`.
        family: the model family, its network on its device and with `requires_grad` set.
        processes: the run's processes; all use the smallest batches of any, and the attention that the first measured.

    Raises:
        ConfigError: the configured attention does not work.
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
        row = training_footprint(model, **circumstances, each=network_rows(config))
        rows = _room(config, model, processes).micro_batch(config, row)
        config = filled(config, train={"micro_batch": processes.min(rows)})
    if config.reference.park is None and (MEMORY_PRESETS[config.memory].park or processes.device.type != "cuda"):
        config = filled(config, reference={"park": MEMORY_PRESETS[config.memory].park})  # no effect on a CPU
    guided = config.sampler.guidance > 1
    if config.sampler.batch is None or config.reference.park is None:
        sample = sampling_footprint(model, **circumstances, guided=guided)
        config = _with_batch(config, model, sample, processes)
    assert config.train.micro_batch is not None
    work = forwards(config)

    def call(model: nn.Module, rows: int) -> None:
        family.denoise(model, *circumstances["inputs"](rows))

    attention = family.choose_attention(
        "sdpa" if config.model.deterministic else config.model.attention,
        model,
        call=call,
        rows=network_rows(config) * config.train.micro_batch,
        device=processes.device,
        dtype=circumstances["dtype"],
        forwards=work.without_gradient / work.trained,
    )
    return filled(config, model={"attention": processes.first(attention)})


def _with_pool(config: Config, model: nn.Module, processes: Processes) -> Config:
    slab = PackedLayout.of(model, DTYPES[config.model.precision]).size
    most = int(SHARES["device"] * free_bytes(processes.device)) // slab
    return filled(config, reference={"gpu_gib": processes.min(min(most, checkpoints(config))) * slab / 2**30})


def _room(config: Config, model: nn.Module, processes: Processes) -> BatchRoom:
    """Returns what this process has for batches; its weights are on the device already."""
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
    """Returns the bytes of a network's trained weights."""
    return sum(weight.numel() * weight.element_size() for weight in trainable(model).values())


def checkpoints(config: Config) -> int:
    """Returns how many past policies a run keeps at its end."""
    draw = config.row.draw
    if draw in (None, "initial"):
        return 1 if draw else 0
    made = -(-config.train.updates // config.train.updates_per_iteration)
    return min(made, 2 if draw == "newest" else config.reference.keep or made)


def pool_bytes(config: Config, model: nn.Module, device: torch.device, free: int) -> int:
    """Returns the device memory of past policies: those kept there, the resident one, and a prefetched one.

    Args:
        config: the run's configuration.
        model: the network.
        device: the run's device.
        free: bytes of the device that the run can use.
    """
    count = checkpoints(config)
    if not count:
        return 0
    slab = PackedLayout.of(model, DTYPES[config.model.precision]).size
    # On a CPU the device's memory is host memory; without a budget, the pool uses at most half of it.
    cuda = device.type == "cuda"
    given = config.reference.gpu_gib if cuda else config.reference.host_gib
    share = SHARES["device" if cuda else "host"]
    kept = min(count * slab, int(share * free) // slab * slab if given is None else int(given * 2**30))
    comes_up = device.type == "cuda" and kept < count * slab and not config.reference.park
    return kept + slab + (slab if comes_up else 0)


def learner_bytes(config: Config, model: nn.Module, shards: int = 1) -> int:
    """Returns the bytes that the learner adds to weights and gradients: Adam's two moments and the moving average."""
    moments = 0.5 if config.train.optimizer == "adamw8bit" else 2
    return int(trained_bytes(model) * (moments + (1 if config.train.ema_decay else 0)) / shards)


def filled(config: Config, **sections: dict[str, Any]) -> Config:
    """Returns `config` with the given keys of its sections replaced."""
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items() if keys}
    return config.model_copy(update=changed)
