"""Context managers for torch's global modes: deterministic algorithms, and isolation from the caller's modes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seppo_fast.utils.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Restricts PyTorch, cuDNN and cuBLAS to deterministic algorithms during the block, in the whole process.

    Enter it before the first matrix product on a GPU: cuBLAS reads its setting then. An operation without a
    deterministic algorithm is an error: if it only warned, PyTorch would keep using cuDNN's attention and the atomic
    additions in the backward of memory-efficient attention.

    Args:
        enabled: whether to do anything at all.

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
    # Every kernel here writes all of its output; filling it first would cost an extra write of each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as problem:
        if "deterministic implementation" not in str(problem):
            raise
        raise ConfigError(
            f"model.deterministic = true: this model cannot run deterministically: "
            f"{str(problem).split(', but')[0]}. Set model.deterministic = false"
        ) from problem
    finally:
        strict, warn_only, filled, *cudnn, workspace = before
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if workspace is None:
            del os.environ[_WORKSPACE]


@contextmanager
def outside_modes() -> Iterator[None]:
    """Suspends the modes of the caller during the block: autocast, `no_grad`, `inference_mode` and default dtype."""
    default = torch.get_default_dtype()
    with _outside_autocast(), torch.inference_mode(False), torch.enable_grad():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


@contextmanager
def _outside_autocast() -> Iterator[None]:
    """Suspends the caller's autocast, whose cache of cast weights would otherwise outlive an update.

    Autocast keeps that cache until its outermost block ends. Training would reuse the casts that sampling made without
    gradients, and so train nothing, and each update would use the casts of the previous one.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    depth = torch.autocast_increment_nesting()
    for _ in range(depth):
        torch.autocast_decrement_nesting()
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)
        for _ in range(depth - 1):
            torch.autocast_increment_nesting()
