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


def node_of(accelerator: Accelerator) -> Node:
    """The processes of a run as those of a machine see each other."""

    def gather(value: Any) -> list[Any]:
        return gather_object([value]) if accelerator.num_processes > 1 else [value]

    return Node(gather, accelerator.process_index)


class Patience:
    """Waits for the other processes for as long as it takes, or until one is gone; all call its methods.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._first = accelerator.is_main_process
        self._group = None
        if accelerator.num_processes > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def wait(self) -> None:
        """Until all processes are here."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)

    def least(self, value: int) -> int:
        """The smallest of all processes' values, once all have one."""
        smallest = torch.tensor(value)
        if self._group is not None:
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self._group)
        return int(smallest)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block alone, then the others do."""
        if not self._first:
            self.wait()
        yield
        if self._first:
            self.wait()


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not answer."""
    if "out of memory" in str(error).lower():
        return False  # NCCL's own buffers
    return isinstance(error, torch.distributed.DistError) or bool(_LOST.search(str(error)))
