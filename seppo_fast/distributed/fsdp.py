"""FSDP2: trained weights, gradients, optimizer state and moving average in shards, one for each process.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. The policy gathers the weights of one unit at a time, in
the forward and again in the backward. References stay whole in each process, in a module of their own that is nothing
but views of the pool's slab, so a rollout needs no other process. What is saved is whole: a run goes on with shards,
with copies or alone.
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
    """Whether the launcher was asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """What accelerate is told of it; None where it is not asked for.

    Raises:
        ConfigError: the first FSDP, or one of the launcher's flags that asks for what is not done.
    """
    if not sharding_asked():
        return None
    # Not each process's own text encoder empty but the first one's, which is the launcher's default.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.fsdp_version != 2:
        raise ConfigError("--use_fsdp alone means the first FSDP; give --fsdp_version 2 too")
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
    """The configuration of a sharded run: what it leaves open and shards do not go with is off.

    Raises:
        ConfigError: a setting that shards do not go with, and what to do.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError("FSDP needs processes that know of each other; start with accelerate launch --use_fsdp")
    wrong = {
        "model.train = lora": (config.model.train == "lora", "its few trained weights fit everywhere: leave out "
            "--use_fsdp, or set model.train = full"),
        f"reference.errors = {config.reference.errors}": (config.reference.errors != "ahead", "use ahead"),
        f"train.optimizer = {config.train.optimizer}": (config.train.optimizer != "adamw", "use adamw, whose state "
            "is sharded"),
        "reference.park = true": (config.reference.park, "the shards are what makes room: use false"),
        "model.compile = true": (config.model.compile, "use false"),
    }  # fmt: skip
    for setting, (is_wrong, instead) in wrong.items():
        if is_wrong:
            raise ConfigError(f"{setting} does not go with FSDP: {instead}")
    pairs, uses = config.train.pairs_per_update, config.reference.uses
    if pairs % (processes * uses):
        raise ConfigError(
            f"train.pairs_per_update = {pairs} must be a multiple of processes x reference.uses = {processes} x {uses} "
            "with FSDP, whose processes go through their micro-batches together"
        )
    off = {"reference": {"park": False}, "model": {"compile": False}}
    return config.model_copy(update={name: getattr(config, name).model_copy(update=keys) for name, keys in off.items()})


def shard(model: nn.Module, units: tuple[type[nn.Module], ...], device: torch.device) -> nn.Module:
    """Shards a network in place, all of whose parameters are trained and contiguous, over all processes.

    Args:
        model: the network.
        units: classes of the modules whose weights are gathered as a whole; what lies outside them is the root's.
        device: of this process.

    Returns:
        A plain module like it, without weights (its own are on `meta`), in whose places others can be put.
    """
    empty = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    plain = copy.deepcopy(model, dict(empty))
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Units stay gathered from no forward to the next thing, so that outside of one the weights are always the shards.
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    for module in model.modules():
        if isinstance(module, units):
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients of all processes are added up, not averaged; by a plain sum, which gloo has too.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return plain


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` had it."""
    return isinstance(module, FSDPModule)


def gather_full(tensor: Tensor) -> Tensor:
    """A tensor as it is, a sharded one gathered: that is for all processes to call, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """A tensor as it is, of a sharded one what this process holds; the parts of all processes are the whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_to_shard(own: Tensor, values: Tensor) -> None:
    """Copies the values of a whole tensor, wherever it is, into another one, or this process's share into its shard."""
    if isinstance(own, DTensor):
        # None: each process has the whole, so nothing is sent.
        own.copy_(distribute_tensor(values.to(own.device), own.device_mesh, own.placements, src_data_rank=None))
    else:
        own.copy_(values)
