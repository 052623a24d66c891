"""The winners' and the losers' part of an update's gradient: their norms, and the angle between them.

At equal weights the losers' part can be many times the winners', and then the losers decide what a clipped step does.
Only the weights' gradient shows this, and there both parts are summed. So a measured update runs forward and backward
twice: first with the gradient of the losers' rows set to zero, then as usual. The losers' part is the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from seppo_fast.distributed.fsdp import is_sharded, own_part
from seppo_fast.distributed.processes import Processes
from seppo_fast.methods.method import Method
from seppo_fast.models.trainable import trainable

Parts = Iterable[tuple[Any, Tensor]]
"""Micro-batches, each with the factor on its gradient."""


class GradientHalves:
    """Measures the winners' and the losers' part of an update's gradient; the update stays the same bit for bit.

    Args:
        policy: the network, its trained weights marked; sharded or not.
        method: computes the loss.
        processes: the run's processes.
        add_gradients: sums the gradients over all processes, unless backward has done so.
        every: number of updates from one measurement to the next; 0: no measurements.
    """

    def __init__(
        self, policy: nn.Module, method: Method, processes: Processes, add_gradients: Callable[[], None], every: int
    ) -> None:
        self._policy = policy
        self._method = method
        self._processes = processes
        self._add_gradients = add_gradients
        self._every = every

    def winners(self, update: int, parts: Parts) -> list[Tensor | None] | None:
        """Returns the gradient of the winners alone.

        The weights have no gradient afterwards, also if iterating over `parts` raises an interruption.

        Args:
            update: the update's index, from 0.
            parts: the update's micro-batches.

        Returns:
            For each trained weight, this process's part of the gradient summed over all processes, on the CPU (None for
            a weight without a gradient); None if the update is not measured or the method has no losers.
        """
        if not self._every or update % self._every:
            return None
        # A method that draws from torch's global generator must draw the same numbers again in the real pass.
        device = self._processes.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                return self._measured(parts)
        finally:
            for weight in trainable(self._policy).values():
                weight.grad = None

    def _measured(self, parts: Parts) -> list[Tensor | None] | None:
        for micro_batch, grad_scale in parts:
            step = self._method.loss(self._policy, micro_batch, grad_scale)
            if step.halves == 1:
                self._every = 0
                return None
            winners, losers = step.grad.chunk(2)
            step.output.backward(torch.cat([winners, torch.zeros_like(losers)]))
        self._add_gradients()
        weights = trainable(self._policy).values()
        # Not on the GPU: a second gradient may not fit beside the activations of the real pass.
        return [None if weight.grad is None else own_part(weight.grad).cpu() for weight in weights]

    def numbers(self, winners: list[Tensor | None], scale: float) -> dict[str, float]:
        """Returns `winner_grad_norm`, `loser_grad_norm` and `grad_cosine`, leaving out non-finite ones.

        Sums are taken in float64. In half precision both gradients are rounded, and so is their difference: if one part
        is below 1 % of the other, little of it survives.

        Args:
            winners: the gradient that `winners` returned.
            scale: the factor in that gradient, the loss scale of half precision; `.grad` must hold the update's
                gradient without it.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self._processes.device)
        for winner, weight in zip(winners, trainable(self._policy).values(), strict=True):
            if winner is None or weight.grad is None:
                continue
            won = winner.to(weight.device).double() / scale
            lost = own_part(weight.grad).double() - won
            sums += torch.stack([won.square().sum(), lost.square().sum(), (won * lost).sum()])
        if is_sharded(self._policy):  # without shards each process has the whole gradient
            sums = self._processes.sum(sums)
        w_w, l_l, w_l = sums.tolist()
        norms = {"winner_grad_norm": w_w**0.5, "loser_grad_norm": l_l**0.5}
        product = math.prod(norms.values())
        norms["grad_cosine"] = w_l / product if product else math.nan
        return {name: value for name, value in norms.items() if math.isfinite(value)}
