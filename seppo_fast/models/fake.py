"""Copies of a network without its data, to count what a call costs or to hold its structure."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

UNet = UNet2DConditionModel | UNetMotionModel
"""The diffusers networks whose attention and checkpointing this package handles."""


def fake_copy(model: nn.Module) -> nn.Module:
    """Returns a copy without data on the CPU, with PyTorch's attention. Make and call it under a `FakeTensorMode`.

    The copy has the shapes, dtypes, memory format, adapters and `requires_grad` flags of `model`, but neither its
    gradients nor its compiled calls.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    fake = copy.deepcopy(model, {id(tensor): _fake_like(tensor) for tensor in tensors})
    if isinstance(fake, UNet):
        fake.set_attn_processor(AttnProcessor2_0())
        if fake.is_gradient_checkpointing:
            # By default, checkpointing saves and restores the state of random generators, which needs real tensors.
            again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            fake.enable_gradient_checkpointing(again)
    return fake


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def empty_copy(model: nn.Module) -> nn.Module:
    """Returns a copy on the `meta` device."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): _meta_like(tensor) for tensor in tensors})


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def follow_cuda(model: nn.Module) -> None:
    """Makes a fake model on the CPU use as much memory as on CUDA, where the two differ.

    On CUDA, autocast runs norms and nearest-neighbour upsampling in float32 (of all operations on torch's list of such,
    those that a UNet uses), and group norm copies channels_last inputs to contiguous memory.
    """

    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x, *others = args or (kwargs.pop("hidden_states"),)
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        return (x.contiguous() if isinstance(module, nn.GroupNorm) else x, *others), kwargs

    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | Upsample2D):
            module.register_forward_pre_hook(prepare, with_kwargs=True)
