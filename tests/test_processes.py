"""Processes of a run: alone, and how a lost one is told from other errors."""

import pytest
import torch
from accelerate import Accelerator

from seppo_fast.distributed.processes import Patience, is_lost_process, node_of


def test_one_process_waits_for_nobody():
    accelerator = Accelerator(cpu=True)
    patience = Patience(accelerator)
    patience.wait()
    assert patience.least(5) == 5
    with patience.first_alone():
        assert node_of(accelerator).world == 1


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
        ConnectionResetError(104, "Connection reset by peer"),  # of a download, say
    ],
)
def test_what_does_not(error):
    assert not is_lost_process(error)
