"""The interface of a training method: it collects what an update learns from, and computes the loss on parts of it.

For each update the trainer calls `collect`, splits the batch with `Batch.micro_batches`, and for each micro-batch calls
`loss` and backpropagates its result. Register a method of your own with `seppo_fast.methods.registry.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """This process's share of what an update learns from.

    Attributes:
        sample_ids: the sample id of each row; `skipped.jsonl` lists those of a skipped update.
    """

    @property
    def sample_ids(self) -> Sequence[int]:
        """See above."""

    def __len__(self) -> int:
        """Returns the number of rows."""

    def micro_batches(self, size: int) -> Iterator[Any]:
        """Yields consecutive parts of at most `size` rows; `len` of a part is its number of rows."""


@dataclass(frozen=True)
class StepLoss:
    """The loss on a micro-batch of b rows.

    Attributes:
        output: a tensor that depends on the policy's weights, such as its prediction or the loss itself. The trainer
            calls `output.backward(grad)`, which accumulates the weights' gradient.
        grad: the gradient of the mean loss over the b rows with respect to `output`, times `grad_scale`.
        sums: the values to log, by name: scalar float32 tensors on the device, each a sum over the b rows. `loss` is
            required. Computing them must not sync with the host.
        halves: 2 if the rows of `grad` are winners followed by as many losers, so that the gradient of each half can
            be measured; 1 if there are no losers.
    """

    output: Tensor
    grad: Tensor
    sums: dict[str, Tensor]
    halves: int = 1


class Method(ABC):
    """Base class of training methods: collects what an update learns from, and computes the loss on it.

    Attributes:
        seconds: duration of the last `collect`; if that prepared several updates at once, an equal share of it.
        sampling_batch: number of samples generated at once, lower than configured if memory turned out to be short;
            None if the method generates none.
    """

    seconds: float = 0.0
    sampling_batch: int | None = None

    @abstractmethod
    def collect(self, update: int, reference: int | None) -> Batch:
        """Returns this process's share of what an update learns from.

        It must depend on the seed, the update and the reference's weights alone, so that a resumed run collects the
        same.

        Args:
            update: the update's index, from 0.
            reference: the index of the past policy drawn for it; None if the method has no reference.
        """

    @abstractmethod
    def loss(self, policy: nn.Module, micro_batch: Any, grad_scale: Tensor) -> StepLoss:
        """Runs the policy on a micro-batch and returns its loss with the gradient; does not call backward.

        Args:
            policy: the network being trained, in the mode (train or eval) in which it is trained.
            micro_batch: a part that `Batch.micro_batches` yielded.
            grad_scale: the factor on the gradient, a float32 scalar on the device.
        """

    def make_room(self, parked: Callable[[], AbstractContextManager[None]]) -> None:  # noqa: B027
        """Receives a context manager that frees device memory; called once, before the first update.

        Called only with `reference.park`. A method may enter the context in `collect` for work that needs memory, such
        as sampling. The default ignores it.

        Args:
            parked: returns a context inside which tensors that only the learner needs are in host memory.
        """

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns the values to log for an update; by default the mean of each sum.

        Args:
            sums: `StepLoss.sums`, added up over all micro-batches and processes.
            rows: number of rows in the update, over all processes.
        """
        return {name: value / rows for name, value in sums.items()}
