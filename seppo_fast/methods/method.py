"""The interface of a training method, which collects the batch of an update and computes the loss on its micro-batches.

For each update the trainer calls `collect`, splits the batch with `Batch.micro_batches`, and for each micro-batch calls
`loss` and backpropagates the result. Register your own method with `seppo_fast.methods.registry.register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Batch(Protocol):
    """This process's share of the training rows of one update.

    Attributes:
        sample_ids: the sample id of each row; `skipped.jsonl` lists the ids of skipped updates.
    """

    @property
    def sample_ids(self) -> Sequence[int]:
        """See above."""

    def __len__(self) -> int:
        """Returns the number of rows."""

    def micro_batches(self, size: int) -> Iterator[Any]:
        """Yields consecutive micro-batches of at most `size` rows; their `len` must be their number of rows."""


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
    """Base class of training methods; see the module docstring for how the trainer calls them.

    Attributes:
        seconds: duration of the last `collect`; if one call prepares several updates, each is assigned an equal share.
        sampling_batch: number of samples generated at once, which is lower than configured if memory ran short; None
            if the method generates no samples.
    """

    seconds: float = 0.0
    sampling_batch: int | None = None

    @abstractmethod
    def collect(self, update: int, reference: int | None) -> Batch:
        """Returns this process's share of the batch of an update.

        Within a run, the batch may depend only on the seed, the update and the reference's weights, so that a resumed
        run collects the same one.

        Args:
            update: the update's index, from 0.
            reference: the index of the past policy drawn for this update; None if the method has no reference.
        """

    @abstractmethod
    def loss(self, policy: nn.Module, micro_batch: Any, grad_scale: Tensor) -> StepLoss:
        """Runs the policy on a micro-batch and returns the loss and its gradient; must not call backward on the policy.

        Args:
            policy: the network being trained, in the mode (train or eval) in which it is trained.
            micro_batch: one of the parts yielded by `Batch.micro_batches`.
            grad_scale: the factor to apply to the gradient, a float32 scalar on the device.
        """

    def make_room(self, parked: Callable[[], AbstractContextManager[None]]) -> None:  # noqa: B027
        """Receives a factory of contexts that free device memory; called once, before the first update.

        Called only with `reference.park`. In `collect`, a method may enter such a context for work that needs memory,
        such as sampling. The default ignores `parked`.

        Args:
            parked: returns a context manager that keeps the optimizer's state in host memory while it is active.
        """

    def rows(self, batch: Any) -> int | None:
        """Returns the number of rows over which an update averages its loss and gradient, over all processes.

        None stands for `train.pairs_per_update`, the default. If there are 0, the update is skipped.

        Args:
            batch: this process's share of the update, as returned by `collect`.
        """
        return None

    def state(self, finished: int) -> dict[str, Any]:
        """Returns what the method needs to resume besides the weights; must be serializable as JSON. Default: nothing.

        Args:
            finished: the number of finished updates.
        """
        return {}

    def files(self) -> Mapping[str, Path]:
        """Returns the files that a state saved now must hold, under the names that they get there.

        They are what `collect` needs beyond the past policies and cannot make again, such as samples of policies that
        are no longer kept. They must never change, since a state holds hard links to them, and their checksums. The
        default returns an empty mapping.
        """
        return {}

    def restore(self, state: dict[str, Any], folder: Path) -> None:  # noqa: B027
        """Restores what `state` and `files` returned; called in all processes of a run that resumes.

        Args:
            state: what `state` returned. States of older versions have none: then it is empty.
            folder: the saved state's folder with the files, whose checksums have been checked. It may be removed later.

        Raises:
            KeyError, TypeError, ValueError: the state does not match this run.
            CheckpointError: a file is missing, or cannot be written.
        """

    def averages(self, sums: dict[str, float], rows: int) -> dict[str, float]:
        """Returns the values to log for an update; by default, each sum divided by `rows`.

        Args:
            sums: `StepLoss.sums`, added up over all micro-batches and processes.
            rows: number of rows in the update, over all processes.
        """
        return {name: value / rows for name, value in sums.items()}
