"""Gradient checkpointing: activations are recomputed in the backward instead of being stored.

UNets for pictures use the checkpointing of diffusers unchanged. In a UNet with motion modules, diffusers does not
checkpoint most of those modules, and in attention it keeps the activations between the transformer blocks. There,
each residual unit (a resnet, a spatial transformer or a motion module) is therefore recomputed as a whole, which keeps
little more than its input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Replaces a module's `forward` by one that recomputes it in the backward. Copying the module copies this too.

    Args:
        forward: the module's own forward. It must draw no random numbers: the random state is not restored.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the module's own forward."""
        if not (self.on and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute_units(model: nn.Module, units: tuple[type[nn.Module], ...]) -> None:
    """Turns on recomputation of each module of these classes as a whole, in place. It changes no bit of the results.

    Args:
        model: the network, in eval mode.
        units: the classes of the modules.
    """
    for module in model.modules():
        if isinstance(module, units):
            module.forward = Recomputed(module.forward)


@contextmanager
def without_recomputation(modules: Collection[nn.Module]) -> Iterator[None]:
    """Turns recomputation in these modules off inside the context."""
    flagged: list[Any] = [module for module in modules if getattr(module, "gradient_checkpointing", False)]
    units = [module.forward for module in modules if isinstance(module.forward, Recomputed) and module.forward.on]
    try:
        _set(flagged, units, False)
        yield
    finally:
        _set(flagged, units, True)


def _set(flagged: Iterable[Any], units: Iterable[Recomputed], on: bool) -> None:
    for module in flagged:
        module.gradient_checkpointing = on
    for unit in units:
        unit.on = on
