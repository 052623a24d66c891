"""How much memory is free, and host memory of an exact size."""

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
    """Whether an error says that memory is spent, the host's or the device's. On a CPU torch says so in words only."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in said or "out of memory" in said
    )


def free_bytes(
    device: torch.device, cgroup: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that new tensors on `device` may take.

    On CUDA, what the driver has left and what PyTorch's allocator holds unused. On the CPU, the RAM that is available,
    or what the memory limits of this process's cgroups leave, where that is less.

    Args:
        device: CUDA or CPU.
        cgroup: Linux's list of the cgroups of this process; need not exist.
        mounts: where these are mounted.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    groups = cgroup.read_text().splitlines() if cgroup.is_file() else []
    rooms = [room for group in groups for room in _cgroup_rooms(group, mounts)]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def host_bytes(size: int) -> Tensor:
    """Host memory `(size,)` uint8, zeros: exactly so many bytes, where PyTorch's pinned ones are a power of two."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def page_locked(memory: Tensor) -> Tensor:
    """The same host memory, registered with the driver for as long as this tensor object lives.

    Raises:
        RuntimeError: the driver refuses.
    """
    place = memory.data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(place, memory.nbytes, 0))
    if code:
        # The runtime keeps the error, and the next launch of a kernel would raise it in its place: take it here.
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device="cuda").fill_(0)
        torch.cuda.check_error(code)
    weakref.finalize(memory, lambda: torch.cuda.cudart().cudaHostUnregister(place))
    return memory


def _cgroup_rooms(group: str, mounts: Path) -> Iterator[int]:
    """What the memory limits of a cgroup, and of those around it, leave, in bytes; nothing where there is no limit.

    Args:
        group: a line of /proc/self/cgroup: `0::/path` (v2), or `4:memory:/path` (v1).
        mounts: where cgroups are mounted.
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
    # Within a container the path can be the host's, and only its root is there to be seen.
    for folder in (mount / part for part in (inner, *inner.parents)):
        if not (folder / limit).is_file() or (bound := (folder / limit).read_text().strip()) == "max":
            continue
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # The kernel drops file pages that nobody has used lately before it refuses memory.
        yield int(bound) - int((folder / use).read_text()) + int(stat[cache])
