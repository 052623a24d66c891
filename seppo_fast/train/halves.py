"""The winners' and the losers' part of an update's gradient: their norms, and the angle between them.

At equal weights the losers' part can be many times the winners', and then the losers decide what a clipped step does.
Which is which shows in the weights' gradient alone, where both are summed, so an update that is measured runs backward
twice: first with the losers' rows set to zero, then as ever. The losers' part is the difference.
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
"""Micro-batches, each with what multiplies its gradient."""


class GradientHalves:
    """Measures an update's gradient by halves; what the update computes does not change by a bit.

    Args:
        policy: the network, its trained weights marked; sharded or not.
        method: has the loss.
        processes: those of the run.
        add_gradients: sums the gradients over all processes where backward does not.
        every: updates between two measurements; 0: none.
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
        """Returns the gradient of the winners alone, for an update from 0.

        Leaves no gradient behind, however it ends: an interruption between two micro-batches is raised from `parts`.

        Returns:
            On the CPU, for each trained weight this process's part, summed over all processes; None where the update
            is not measured, or the method has no losers.
        """
        if not self._every or update % self._every:
            return None
        # A method that draws by torch's global generator must draw the same in the true pass.
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
        # Not on the GPU: a second gradient may not fit beside the activations of the true pass.
        return [None if weight.grad is None else own_part(weight.grad).cpu() for weight in weights]

    def numbers(self, winners: list[Tensor | None], scale: float) -> dict[str, float]:
        """Returns `winner_grad_norm`, `loser_grad_norm` and `grad_cosine`, where they are finite.

        Sums are taken in float64. In half precision both gradients are rounded, and so is their difference: of a part
        below 1 % of the other little is left.

        Args:
            winners: what `winners` returned.
            scale: what multiplied that gradient, the scale of half precision; `.grad` holds the true one without it.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=self._processes.device)
        for winner, weight in zip(winners, trainable(self._policy).values(), strict=True):
            if winner is None or weight.grad is None:
                continue
            won = winner.to(weight.device).double() / scale
            lost = own_part(weight.grad).double() - won
            sums += torch.stack([won.square().sum(), lost.square().sum(), (won * lost).sum()])
        if is_sharded(self._policy):  # else each process has the whole
            sums = self._processes.accelerator.reduce(sums, "sum")
        w_w, l_l, w_l = sums.tolist()
        norms = {"winner_grad_norm": w_w**0.5, "loser_grad_norm": l_l**0.5}
        product = math.prod(norms.values())
        norms["grad_cosine"] = w_l / product if product else math.nan
        return {name: value for name, value in norms.items() if math.isfinite(value)}
