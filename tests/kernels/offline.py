"""Compiles kernels, through their own launches, for GPUs that are not present, and inspects their machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.kernels.launches import launches

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """The part of Triton's driver that compiling needs, with one device per target, since Triton caches by device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"offline {self._target}"

    def get_current_stream(self, device: str) -> int:
        return 0


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        kernel: Triton's kernel object, with the code of every compilation stage.
        folds: the number of folds that the program was compiled for.
    """

    kernel: Any
    folds: int

    @cached_property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    @cached_property
    def usage(self) -> dict[str, int]:
        """A thread's registers and bytes of stack, keyed as in the output of `cuobjdump -res-usage`."""
        text = self._tool("cuobjdump", "-res-usage")
        return {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}

    @cached_property
    def operations(self) -> list[str]:
        """The opcodes of the machine code, first to last."""
        line = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
        return line.findall(self._tool("nvdisasm", "-c"))

    def count(self, opcode: str) -> Counter[str]:
        """Returns how often an opcode occurs, for each of its modifiers."""
        return Counter(x.removeprefix(opcode) for x in self.operations if re.fullmatch(rf"{opcode}(\..*)?", x))

    def _tool(self, name: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            return subprocess.run([_TOOLS / name, option, file.name], check=True, capture_output=True, text=True).stdout


def compiled(target: GPUTarget, call: Callable[[], Any]) -> list[Code]:
    """Returns the kernels that `call` launches, compiled for the target as those launches specialise them, not run."""
    with mock.patch.object(driver, "_active", _Driver(target)), launches(warmup=True) as made:
        call()
    return [Code(launch.result, launch.arguments.get("FOLDS", 1)) for launch in made]
