"""Copies of a network without its data: to count what a call takes, or to know its structure."""

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
"""The networks of diffusers whose attention and checkpointing are known."""


def fake_copy(model: nn.Module) -> nn.Module:
    """A copy without data, on the CPU, to be made and called under a `FakeTensorMode`; its attention is PyTorch's.

    Shapes, dtypes, memory format, adapters and the marks of trained weights are those of `model`. Gradients and
    compiled calls are not copied.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    fake = copy.deepcopy(model, {id(tensor): _fake_like(tensor) for tensor in tensors})
    if isinstance(fake, UNet):
        fake.set_attn_processor(AttnProcessor2_0())
        if fake.is_gradient_checkpointing:
            # By default it restores the state of the random generators, which is data.
            again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            fake.enable_gradient_checkpointing(again)
    return fake


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy on `meta`."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): _meta_like(tensor) for tensor in tensors})


def _meta_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def follow_cuda(model: nn.Module) -> None:
    """Lets a fake model on the CPU do what CUDA does otherwise, where that costs memory.

    Autocast computes norms and nearest-neighbour upsampling in float32 there (of torch's list of such operations, what
    a UNet uses), and group norm copies channels_last to contiguous memory.
    """

    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x, *others = args or (kwargs.pop("hidden_states"),)
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        return (x.contiguous() if isinstance(module, nn.GroupNorm) else x, *others), kwargs

    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | Upsample2D):
            module.register_forward_pre_hook(prepare, with_kwargs=True)
