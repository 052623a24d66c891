"""The past policies from which references are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from seppo_fast.diffusion import keyed_rng
from seppo_fast.policy import trainable


class ReferencePool:
    """Checkpoints 0..k-1 of the trained weights, in host memory, raw (never the moving average).

    Args:
        seed: of the draws.
        draw: `uniform` over all checkpoints so far (Algorithm 1), the `newest`, or the `initial` one.
    """

    def __init__(self, seed: int, draw: Literal["uniform", "newest", "initial"]) -> None:
        self._seed = seed
        self._draw = draw
        self._checkpoints: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self._checkpoints)

    def add(self, module: nn.Module) -> int:
        """Copies the trained weights of `module`; returns the index of the new checkpoint."""
        self._checkpoints.append(
            {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(module).items()}
        )
        return len(self._checkpoints) - 1

    def draw(self, number: int) -> int:
        """The index for draw `number`: a function of (seed, number, checkpoints so far), equal on every rank.

        Raises:
            ValueError: the pool is empty.
        """
        if not self._checkpoints:
            raise ValueError("draw: the pool is empty; add checkpoint 0, the initial policy, first")
        if self._draw == "initial":
            return 0
        if self._draw == "newest":
            return len(self) - 1
        return int(keyed_rng(self._seed, "reference", number).integers(len(self)))

    def load_into(self, module: nn.Module, index: int) -> None:
        """Writes checkpoint `index` into the trained weights of `module`, in place and bit for bit."""
        checkpoint = self._checkpoints[index]
        with torch.no_grad():
            for name, weight in trainable(module).items():
                weight.copy_(checkpoint[name])

    @contextmanager
    def resident(self, module: nn.Module, index: int, aside: torch.device | None = None) -> Iterator[nn.Module]:
        """`module` is checkpoint `index` inside the block and the policy again after it, also on an error.

        One set of weights is enough because a drawn reference is frozen: all that depends on it is made ahead of
        the updates that use it. The storage of the weights stays where it is.

        Args:
            module: the policy.
            index: of the checkpoint.
            aside: where the policy's weights wait; None: where they are.
        """
        policy = {
            name: weight.detach().to(aside or weight.device, copy=True) for name, weight in trainable(module).items()
        }
        self.load_into(module, index)
        try:
            yield module
        finally:
            with torch.no_grad():
                for name, weight in trainable(module).items():
                    weight.copy_(policy[name])
