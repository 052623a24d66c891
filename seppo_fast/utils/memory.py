"""Queries free memory, recognises out-of-memory errors, and allocates host memory of an exact size."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception means that host or device memory ran out; on a CPU only torch's message tells."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in said or "out of memory" in said
    )


def free_bytes(
    device: torch.device, cgroup: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> int:
    """Returns how many bytes new tensors on `device` can use.

    On CUDA this is the driver's free memory plus what PyTorch's allocator has reserved but does not use. On the CPU it
    is the available RAM or what the memory limits of this process's cgroups leave, whichever is less.

    Args:
        device: a CUDA device or the CPU.
        cgroup: Linux's list of the cgroups of this process; it need not exist.
        mounts: the folder in which the cgroups are mounted.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    groups = cgroup.read_text().splitlines() if cgroup.is_file() else []
    rooms = [room for group in groups for room in _cgroup_rooms(group, mounts)]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def host_bytes(size: int) -> Tensor:
    """Allocates zeroed host memory `(size,)` uint8; PyTorch's pinned allocator would round it up to a power of two."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def page_locked(memory: Tensor) -> Tensor:
    """Page-locks host memory for as long as this tensor object lives, and returns the same tensor.

    Raises:
        RuntimeError: the CUDA driver refuses to register the memory.
    """
    place = memory.data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(place, memory.nbytes, 0))
    if code:
        # The CUDA runtime keeps the error and the next kernel launch would raise it: this launch clears it.
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device="cuda").fill_(0)
        torch.cuda.check_error(code)
    weakref.finalize(memory, lambda: torch.cuda.cudart().cudaHostUnregister(place))
    return memory


def _cgroup_rooms(group: str, mounts: Path) -> Iterator[int]:
    """Yields the bytes that each memory limit of a cgroup and its ancestors leaves; yields nothing if none has a limit.

    Args:
        group: a line of /proc/self/cgroup: `0::/path` (v2) or `4:memory:/path` (v1).
        mounts: the folder in which cgroups are mounted.
    """
    _, controllers, path = group.split(":", 2)
    if not controllers:
        mount, limit, use, cache = mounts, "memory.max", "memory.current", "inactive_file"
    elif "memory" in controllers.split(","):
        mount, limit, use = mounts / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        cache = "total_inactive_file"
    else:
        return
    inner = PurePosixPath(path.lstrip("/"))
    # Inside a container the path may be the host's, of which only the root is visible.
    for folder in (mount / part for part in (inner, *inner.parents)):
        if not (folder / limit).is_file() or (bound := (folder / limit).read_text().strip()) == "max":
            continue
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Inactive file pages count as free: the kernel drops them before it refuses memory.
        yield int(bound) - int((folder / use).read_text()) + int(stat[cache])
