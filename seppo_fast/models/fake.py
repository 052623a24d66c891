"""A copy of a model without its data, on which calls can be counted."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seppo_fast.models.family import UNet

FamilyDenoise = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""How a family calls its UNet: (unet, latents (B, *latent), timesteps (B,), prompt_embeds (B, L, D)) -> prediction"""


def call_plainly(unet: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """The prediction of a UNet that takes one embedding a row, as those for pictures do."""
    return unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


def fake_copy(unet: UNet) -> UNet:
    """A copy without data, on the CPU, to be made and called under a `FakeTensorMode`; its attention is PyTorch's.

    Shapes, dtypes, memory format, adapters and the marks of trained weights are those of `unet`. Gradients and compiled
    calls are not copied.
    """
    tensors = itertools.chain(unet.parameters(), unet.buffers())
    fake = copy.deepcopy(unet, {id(tensor): _fake_like(tensor) for tensor in tensors})
    fake.set_attn_processor(AttnProcessor2_0())
    if fake.is_gradient_checkpointing:
        # By default it restores the state of the random generators, which is data.
        fake.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    return fake


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
