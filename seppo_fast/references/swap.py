"""Swapping of a module's tensors, so that it computes with others for a while.

The module's own `Parameter` objects are taken out, not written to: an optimizer, hooks and the reducer of distributed
training hold on to them, and assigning to `.data` would make autograd forget the hooks if dtype or device change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str, Tensor]


def swap_parameters(module: nn.Module, own: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[Place]:
    """Replaces `own` with `others`, by name; a tensor in several places (tied weights) is replaced in all of them.

    Args:
        module: the module that holds `own`.
        own: the module's parameters and buffers to replace.
        others: a tensor of the same kind for each.

    Returns:
        Layer, name and former tensor of each place, for `restore_parameters`.
    """
    replaced = {id(tensor): others[name] for name, tensor in own.items()}
    places = []
    for layer in module.modules():
        found = (
            *layer.named_parameters(recurse=False, remove_duplicate=False),
            *layer.named_buffers(recurse=False, remove_duplicate=False),
        )
        for leaf, tensor in found:
            if id(tensor) in replaced:
                places.append((layer, leaf, tensor))
                setattr(layer, leaf, replaced[id(tensor)])
    return places


def restore_parameters(places: list[Place]) -> None:
    """Undoes `swap_parameters`, whatever tensors the places hold now."""
    for layer, leaf, tensor in places:
        setattr(layer, leaf, tensor)


@torch.no_grad()
def offload(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies tensors to a device and frees their own memory; the tensor objects stay, without data.

    A tensor that shares its memory with others, or lies in a mapped file, is left as it is and is not in the result.
    On a CPU, reading a tensor without data crashes the process.
    """
    copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items() if _is_alone(tensor)}
    for name in copies:
        tensors[name].untyped_storage().resize_(0)
    return copies


@torch.no_grad()
def reload(tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
    """Undoes `offload`; the data may be at another address afterwards."""
    for name, copy in copies.items():
        tensors[name].untyped_storage().resize_(copy.untyped_storage().nbytes())
        tensors[name].copy_(copy)


def _is_alone(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.numel() * tensor.element_size()
