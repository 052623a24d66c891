"""Processes of a run: a single one, and how the loss of a process is distinguished from other errors."""

import pytest
import torch
from accelerate import Accelerator

from seppo_fast.distributed.processes import Processes, is_lost_process


def test_one_process_waits_for_nobody():
    processes = Processes(Accelerator(cpu=True))
    processes.barrier()
    processes.barrier(patient=True)
    assert processes.min(5) == 5 and processes.first(6) == 6 and processes.same(7)
    assert processes.any(True, False) == [True, False]
    with processes.first_alone():
        assert (processes.rank, processes.world, processes.main, processes.machine.world) == (0, 1, True, 1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7064."),
        RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation"),
        RuntimeError("[/gloo/transport/tcp/pair.cc:1] writev [127.0.0.1]:7064: Broken pipe"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
    ],
)
def test_what_says_that_a_process_is_lost(error):
    assert is_lost_process(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.distributed.DistBackendError("NCCL error: ncclUnhandledCudaError: Cuda failure 2 'out of memory'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        MemoryError(),
        ConnectionResetError(104, "Connection reset by peer"),  # from a download, for example
    ],
)
def test_what_does_not(error):
    assert not is_lost_process(error)
