"""The processes of a run: how they find each other, and how long they wait for each other.

Where processes compute together, one waits for the others for `_TIMEOUT` at most, and then the run ends. What may take
hours is waited for beside that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
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
# What gloo says, of which every message names its source file; NCCL's errors have a type of their own.
_LOST = re.compile(r"gloo.*(connection|timed out|socket|read error|write error|broken pipe)", re.IGNORECASE | re.DOTALL)


def processes() -> Accelerator:
    """The device of this process and its ways to the others.

    Raises:
        ConfigError: see `sharding_plugin`.
    """
    # Autocast is ours, one for policy and reference.
    timeout = InitProcessGroupKwargs(timeout=_TIMEOUT)
    return Accelerator(mixed_precision="no", kwargs_handlers=[timeout], fsdp_plugin=sharding_plugin())


class Processes:
    """What the processes of a run ask each other. All of them call a method together, or none.

    Attributes:
        accelerator: the device of this process and its ways to the others.
        device: where it computes.
        rank: its number.
        world: how many there are.
        main: whether it is the first one.
        machine: those of this machine.

    Args:
        accelerator: see above; made here where it is None.

    Raises:
        ConfigError: see `sharding_plugin`.
    """

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self.accelerator = accelerator or processes()
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        self.machine = Node(self._gather, self.rank)
        set_rank(self.rank, self.world, self.accelerator.is_local_main_process)
        # Beside the device's own group, for what may take hours.
        self._patient = None
        if self.world > 1:
            self._patient = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def _gather(self, value: Any) -> list[Any]:
        return gather_object([value]) if self.world > 1 else [value]

    def any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is up in any process."""
        if self.world == 1:
            return list(flags)
        counts = torch.tensor([float(flag) for flag in flags], device=self.device)
        return [count > 0 for count in self.accelerator.reduce(counts, "sum").tolist()]

    def min(self, value: int) -> int:
        """Returns the smallest of all processes' values, once all have one, however long that takes."""
        smallest = torch.tensor(value)
        if self._patient is not None:
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self._patient)
        return int(smallest)

    def same(self, value: Any) -> bool:
        """Returns whether all processes have the same value."""
        return self.machine.same(value)

    def first(self, value: Any) -> Any:
        """Returns the value of the first process."""
        return self.machine.first(value)

    def barrier(self, patient: bool = False) -> None:
        """Waits until all processes are here; `patient`: for as long as it takes, or until one is gone."""
        if not patient:
            self.accelerator.wait_for_everyone()
        elif self._patient is not None:
            torch.distributed.barrier(group=self._patient)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first process go through the block alone, then the others; patiently."""
        if not self.main:
            self.barrier(patient=True)
        yield
        if self.main:
            self.barrier(patient=True)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not answer."""
    if "out of memory" in str(error).lower():
        return False  # NCCL's own buffers
    return isinstance(error, torch.distributed.DistError) or bool(_LOST.search(str(error)))
