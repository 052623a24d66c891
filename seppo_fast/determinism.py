"""Runs that repeat bit for bit on a GPU, where PyTorch's fastest kernels do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seppo_fast.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Lets PyTorch, cuDNN and cuBLAS use deterministic algorithms only, inside the block and in the whole process.

    To be entered before the first matrix product on a GPU, when cuBLAS reads its setting. An operation without a
    deterministic algorithm ends the run: with warnings instead, PyTorch would keep cuDNN's attention and the atomic
    additions in the backward of memory-efficient attention.

    Args:
        enabled: whether to do anything.

    Raises:
        ConfigError: the block uses an operation that has no deterministic algorithm.
    """
    if not enabled:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        os.environ.get(_WORKSPACE),
    )
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Every kernel here writes all of its output, and filling it before would cost a write of each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as problem:
        if "deterministic implementation" not in str(problem):
            raise
        raise ConfigError(
            f"model.deterministic = true: this model needs an operation that does not repeat: "
            f"{str(problem).split(', but')[0]}. Set it to false"
        ) from problem
    finally:
        strict, warn_only, filled, *cudnn, workspace = before
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            del os.environ[_WORKSPACE]
