"""Triton's own driver and launcher on a stub of libcuda: real launches of compiled kernels, recorded instead of run.

The process must be started with the variables of `environment`, since the loader reads LD_LIBRARY_PATH only at start.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton.backends.nvidia.driver as nvidia
from triton.runtime.driver import driver

from tests.kernels.launches import Launch, launches

CAPABILITY = (9, 0)
STREAM = 0x5EED0  # a handle that no stream has by accident
_SOURCE = Path(__file__).with_name("stub_cuda.c")
_MOST_PARAMETERS, _MOST_BYTES = 128, 8  # as in stub_cuda.c


class _Record(ctypes.Structure):
    """The struct `stub_launch` of stub_cuda.c."""

    _fields_ = (
        ("launches", ctypes.c_int),
        ("count", ctypes.c_int),
        ("sizes", ctypes.c_int * _MOST_PARAMETERS),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("kernel", ctypes.c_char_p),
        ("parameters", ctypes.c_ubyte * _MOST_BYTES * _MOST_PARAMETERS),
    )


def environment(compiler: str, folder: Path) -> dict[str, str]:
    """Builds the stub in a folder; returns the environment variables with which a process loads it as the driver."""
    headers = Path(nvidia.__file__).parent / "include"
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", headers]
    subprocess.run([compiler, *options, "-o", folder / "libcuda.so.1", _SOURCE], check=True)
    return {
        **os.environ,
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "TRITON_CACHE_DIR": str(folder / "cache"),  # not shared: Triton's driver modules are linked to this stub
    }


class _Driver(nvidia.CudaDriver):
    """Triton's driver with a fixed device and stream, for which it would otherwise call torch."""

    def __init__(self, device: int, launcher: type) -> None:
        self.utils = nvidia.CudaUtils()
        self.launcher_cls = launcher
        self.get_device_capability = lambda device: CAPABILITY
        self.get_current_device = lambda: device
        self.get_current_stream = lambda device: STREAM


class _Swapped(nvidia.CudaLauncher):
    """A faulty launcher that swaps the kernel's first two arguments."""

    def __call__(self, *args: Any) -> None:
        # The nine arguments before them: three grid sizes, stream, function, two pieces of metadata, two hooks.
        super().__call__(*args[:9], args[10], args[9], *args[11:])


def recorded(call: Callable[[], Any], *, swapped: bool = False) -> list[dict[str, Any]]:
    """Records a call's launches: the arguments in Python, the kernel's parameters, and what arrived at the driver.

    Args:
        call: a function that makes the launches.
        swapped: whether to use a faulty launcher that swaps the kernel's first two arguments.
    """
    # The faulty launcher has its own device, since Triton caches kernels with their launchers by device.
    driver.set_active(_Driver(1, _Swapped) if swapped else _Driver(0, nvidia.CudaLauncher))
    with launches(around=_record) as made:
        call()
    return [_as_json(launch) for launch in made]


def _record(run: Callable[..., Any]) -> tuple[Any, int, _Record]:
    """Compiles the kernel, tells the stub the sizes of its parameters, and launches it."""
    record = _Record.in_dll(ctypes.CDLL("libcuda.so.1"), "stub_launch")
    before = record.launches
    kernel = run(warmup=True)
    types = ptx_parameters(kernel.asm["ptx"])
    record.count = len(types)
    record.sizes[: len(types)] = [int(re.sub(r"\D", "", x)) // 8 for x in types]
    run()
    return kernel, record.launches - before, _Record.from_buffer_copy(record)


def ptx_parameters(ptx: str) -> list[str]:
    """Returns the types of a kernel's parameters, in order."""
    (entry,) = re.findall(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    return re.findall(r"\.param \.(\w+)", entry)


def _flat(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, int | float]]:
    """Yields name, type and value of everything that an argument passes to the kernel; constants pass nothing."""
    if isinstance(kind, tuple):
        for place, (of_one, x) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(f"{name}[{place}]", of_one, x)
    elif kind != "constexpr":
        yield name, kind, value.data_ptr() if kind.startswith("*") else value


def _as_json(launch: Launch) -> dict[str, Any]:
    kernel, count, record = launch.result
    signature = kernel.src.signature
    return {
        "kernel": launch.kernel,
        "options": {key: x for key, x in launch.options.items() if key in ("grid", "num_warps", "enable_fp_fusion")},
        "arguments": [x for name, kind in signature.items() for x in _flat(name, kind, launch.arguments[name])],
        "ptx": ptx_parameters(kernel.asm["ptx"]),
        "shared": kernel.metadata.shared,
        "arrived": {
            "launches": count,
            "kernel": record.kernel.decode(),
            "grid": list(record.grid),
            "block": list(record.block),
            "shared": record.shared,
            "attributes": record.attributes,
            "stream": record.stream,
            "parameters": [bytes(x[:size]).hex() for x, size in zip(record.parameters[: record.count], record.sizes)],
        },
    }
