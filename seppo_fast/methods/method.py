"""What a training method is: what it collects for an update, and its loss on a part of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """What an update learns from, this process's share of it.

    Attributes:
        sample_ids: of its rows; the log names those of an update that had to be skipped.
    """

    @property
    def sample_ids(self) -> Sequence[int]:
        """See above."""

    def __len__(self) -> int:
        """Rows."""

    def micro_batches(self, size: int) -> Iterator[Any]:
        """Consecutive parts of at most `size` rows, each with a length of its own."""


@dataclass(frozen=True)
class StepLoss:
    """What a micro-batch of b rows gives.

    Attributes:
        output: depends on the policy's weights; `output.backward(grad)` makes their gradient.
        grad: of the mean loss over the b rows to `output`, scaled as asked.
        sums: name to scalar float32 tensor on the device, each a sum over the rows, `loss` among them; nothing here
            syncs with the host.
        halves: 2 where the rows of `grad` are winners stacked on as many losers, 1 where there are no losers.
    """

    output: Tensor
    grad: Tensor
    sums: dict[str, Tensor]
    halves: int = 1


class Method(ABC):
    """Collects what an update learns from, and has a loss.

    Attributes:
        seconds: that the last `collect` took, an equal share of it where it was for several updates.
        sampling_batch: samples that are made at once, where samples are made; less than configured where memory is
            short.
    """

    seconds: float = 0.0
    sampling_batch: int | None = None

    @abstractmethod
    def collect(self, update: int, reference: int | None) -> Batch:
        """Returns what an update learns from; a function of the seed, the update and the reference's weights alone.

        Args:
            update: the update, from 0.
            reference: index of the drawn past policy; None where the method has none.
        """

    @abstractmethod
    def loss(self, policy: nn.Module, micro_batch: Any, grad_scale: Tensor) -> StepLoss:
        """Runs the policy on a micro-batch.

        Args:
            policy: the network, in the mode in which it is trained.
            micro_batch: one of those of a batch.
            grad_scale: multiplies the gradient; one float32 on the device.
        """

    def make_room(self, parked: Callable[[], AbstractContextManager[None]]) -> None:  # noqa: B027
        """Takes a context in which what only the learner needs is off the device, for what needs room."""

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns what the log shows, of the sums over all `rows` of an update."""
        return {name: value / rows for name, value in sums.items()}
