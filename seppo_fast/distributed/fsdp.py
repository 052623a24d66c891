"""FSDP2: trained weights, gradients, optimizer state and moving average are sharded over the processes.

Turned on by `accelerate launch --use_fsdp --fsdp_version 2`. The policy gathers the weights of one unit at a time, in
the forward and again in the backward. References are not sharded: each process loads a whole one into a separate module
whose parameters are views of the pool's slab, so rollouts send nothing between processes. Saved states are whole, so a
run can be resumed with shards, with copies or with one process.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from seppo_fast.config.schema import Config
from seppo_fast.utils.errors import ConfigError


def sharding_asked() -> bool:
    """Returns whether the launcher turned on FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """Returns accelerate's FSDP plugin, or None if FSDP is off.

    Raises:
        ConfigError: FSDP version 1, or a launcher flag that is not supported.
    """
    if not sharding_asked():
        return None
    # The launcher's default (True) would load pretrained modules in the first process only and leave them empty in the
    # others, text encoders included.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise ConfigError("--use_fsdp alone selects FSDP version 1, which is not supported; add --fsdp_version 2")
    offloads = os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
    refused = {
        "--fsdp_offload_params true": (offloads, "leave it out"),
        "--fsdp_activation_checkpointing true": (plugin.activation_checkpointing, "use model.gradient_checkpointing"),
        "--fsdp_reshard_after_forward false": (not plugin.reshard_after_forward, "leave it out"),
    }
    for flag, (is_given, instead) in refused.items():
        if is_given:
            raise ConfigError(f"{flag} is not supported; {instead}")
    return plugin


def validate_fsdp_config(config: Config, processes: int) -> Config:
    """Returns the configuration of a sharded run, with parking of weights and compilation off if they are not set.

    Args:
        config: the run's configuration.
        processes: number of processes.

    Raises:
        ConfigError: a setting is not supported with FSDP; the message says what to use instead.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError("FSDP needs a process group; start with accelerate launch --use_fsdp --fsdp_version 2")
    wrong = {
        "model.train = lora": (config.model.train == "lora", "a LoRA has too few weights to be worth sharding; leave "
            "out --use_fsdp, or set model.train = full"),
        f"objective = {config.objective}": (config.row.replay or config.row.reward is not None,
            "its updates differ in size; leave out --use_fsdp"),
        f"reference.errors = {config.reference.errors}": (config.reference.errors != "ahead", "use ahead"),
        f"train.optimizer = {config.train.optimizer}": (config.train.optimizer != "adamw", "use adamw, whose state "
            "is sharded"),
        "reference.park = true": (config.reference.park, "shards make room already; use false"),
        "model.compile = true": (config.model.compile, "use false"),
    }  # fmt: skip
    for setting, (is_wrong, instead) in wrong.items():
        if is_wrong:
            raise ConfigError(f"{setting} is not supported with FSDP: {instead}")
    pairs, uses = config.train.pairs_per_update, config.reference.uses
    key, together = ("rpo.block", config.block) if config.block > 1 else ("reference.uses", uses)
    if pairs % (processes * together):
        raise ConfigError(
            f"train.pairs_per_update = {pairs} must be a multiple of processes x {key} = {processes} x {together} "
            "with FSDP, as all processes must have the same number of micro-batches"
        )
    off = {"reference": {"park": False}, "model": {"compile": False}}
    return config.model_copy(update={name: getattr(config, name).model_copy(update=keys) for name, keys in off.items()})


def shard(model: nn.Module, units: tuple[type[nn.Module], ...], device: torch.device) -> nn.Module:
    """Shards a network over all processes, in place.

    Args:
        model: the network; all of its parameters must be trained and contiguous.
        units: classes of modules whose weights are gathered together; the root gathers all weights outside them.
        device: this process's device.

    Returns:
        An unsharded copy of the network with parameters on `meta`, into which other weights can be put.
    """
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    plain = copy.deepcopy(model, dict(empty))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Units, the root included, are resharded after each forward, so that outside of one the weights are always shards.
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    for module in model.modules():
        if isinstance(module, units):
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed over the processes, not averaged; a plain sum, which gloo supports too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return plain


def is_sharded(module: nn.Module) -> bool:
    """Returns whether `shard` has sharded a module."""
    return isinstance(module, FSDPModule)


def gather_full(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor gathered, for which all processes must call this in the same order; others unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_to_shard(own: Tensor, values: Tensor) -> None:
    """Copies a whole tensor, on any device, into `own`; if that is sharded, each process copies its shard's part."""
    if isinstance(own, DTensor):
        # src_data_rank=None: each process has the whole tensor, so nothing is sent.
        own.copy_(distribute_tensor(values.to(own.device), own.device_mesh, own.placements, src_data_rank=None))
    else:
        own.copy_(values)
