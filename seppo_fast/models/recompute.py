"""Gradient checkpointing: activations are made again in the backward instead of being kept.

diffusers marks the places itself, and for pictures these are taken as they are. Of a UNet with motion modules it leaves
most of those out, and in attention it keeps what lies between the transformer blocks. So there each residual unit, a
resnet, a spatial transformer or a motion module, is recomputed as a whole, and little more than its input is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Stands in a module's place of `forward`; a copy of the module gets one of its own.

    Args:
        forward: the module's own. It must draw no random numbers: their state is not kept.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self.on = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        if not (self.on and torch.is_grad_enabled()):
            return self._forward(*args, **kwargs)
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute_units(model: nn.Module, units: tuple[type[nn.Module], ...]) -> None:
    """Recomputes modules of these classes as wholes, in place, of a network in eval mode; all keeps its bits."""
    for module in model.modules():
        if isinstance(module, units):
            module.forward = Recomputed(module.forward)


@contextmanager
def without_recomputation(modules: Collection[nn.Module]) -> Iterator[None]:
    """Inside, nothing is recomputed in these modules."""
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
