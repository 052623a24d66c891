"""The processes of a run: how they communicate, and how long they wait for each other.

Collectives of the computation time out after `_TIMEOUT`, which ends the run. Waiting for work that may take hours uses
a separate group, with `_PATIENCE`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object

from seppo_fast.distributed.fsdp import sharding_plugin
from seppo_fast.distributed.machine import Node
from seppo_fast.utils.logging import set_rank

_TIMEOUT = timedelta(minutes=30)
_PATIENCE = timedelta(days=2)
# Errors from gloo are recognised by their text, which names a gloo source file; NCCL's errors have their own type.
_LOST = re.compile(r"gloo.*(connection|timed out|socket|read error|write error|broken pipe)", re.IGNORECASE | re.DOTALL)


def processes() -> Accelerator:
    """Returns the accelerator: this process's device and its communication with the others.

    Raises:
        ConfigError: see `sharding_plugin`.
    """
    # mixed_precision="no", because this package applies autocast itself, the same for policy and reference.
    timeout = InitProcessGroupKwargs(timeout=_TIMEOUT)
    return Accelerator(mixed_precision="no", kwargs_handlers=[timeout], fsdp_plugin=sharding_plugin())


class Processes:
    """The collectives of a run's processes. A method must be called by all processes or by none.

    Attributes:
        accelerator: this process's device and its communication with the others.
        device: this process's device.
        rank: this process's rank.
        world: number of processes.
        main: whether this is the first process.
        machine: the processes grouped by machine.

    Args:
        accelerator: see above; created if None.

    Raises:
        ConfigError: see `sharding_plugin`.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator or processes()
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.machine = Node(self.gather, self.rank)
        set_rank(self.rank, self.world, self.accelerator.is_local_main_process)
        # In addition to the device's own group: for waiting that may take hours.
        self._patient = None
        if self.world > 1:
            self._patient = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is true in any process."""
        if self.world == 1:
            return list(flags)
        counts = torch.tensor([float(flag) for flag in flags], device=self.device)
        return [count > 0 for count in self.sum(counts).tolist()]

    def min(self, value: int) -> int:
        """Returns the smallest of all processes' values, waiting for each of them up to `_PATIENCE`."""
        smallest = torch.tensor(value)
        if self._patient is not None:
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self._patient)
        return int(smallest)

    def same(self, value: Any) -> bool:
        """Returns whether all processes have the same value."""
        return self.machine.same(value)

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, by rank."""
        return gather_object([value]) if self.world > 1 else [value]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of all processes' tensors, on this process's device."""
        total: torch.Tensor = self.accelerator.reduce(tensor, "sum")
        return total

    def sum_gradients(self, gradients: Iterable[torch.Tensor]) -> None:
        """Sums tensors over all processes in place, one by one; they must come in the same order in all processes."""
        works = [torch.distributed.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work in works:
            work.wait()

    def first(self, value: Any) -> Any:
        """Returns the value of the first process."""
        return self.machine.first(value)

    def barrier(self, patient: bool = False) -> None:
        """Waits until all processes have called this; fails after `_TIMEOUT`, or after `_PATIENCE` if `patient`."""
        if not patient:
            self.accelerator.wait_for_everyone()
        elif self._patient is not None:
            torch.distributed.barrier(group=self._patient)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first process run the block alone, then the others, which wait for it up to `_PATIENCE`."""
        if not self.main:
            self.barrier(patient=True)
        yield
        if self.main:
            self.barrier(patient=True)


def is_lost_process(error: BaseException) -> bool:
    """Returns whether an exception means that another process has ended or does not respond."""
    if "out of memory" in str(error).lower():
        return False  # NCCL could not allocate its own buffers
    return isinstance(error, torch.distributed.DistError) or bool(_LOST.search(str(error)))
