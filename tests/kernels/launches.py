"""Recording of kernel launches: which kernels, with which arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import seppo_fast.kernels.denoising_error as errors


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the kernel's name.
        arguments: the kernel's arguments, by name.
        options: everything else that was passed: the grid, warps, whether products and sums are contracted.
        result: the return value of `around`, by default that of Triton's `run`.
    """

    kernel: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    result: Any


@contextmanager
def launches(
    around: Callable[[Callable[..., Any]], Any] = lambda run: run(), **replaced: Any
) -> Iterator[list[Launch]]:
    """Yields the launches made inside the context, of compiled or interpreted kernels.

    Args:
        around: a function called instead of each launch. Its argument is a function that makes the launch and accepts
            further options to replace.
        replaced: arguments of Triton's `run` to replace in every launch.
    """
    kind = type(errors._errors_fwd_kernel)
    original, seen = kind.run, []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = around(lambda **options: original(self, *args, **{**kwargs, **replaced, **options}))
        named = dict(zip(self.arg_names, args)) | {key: x for key, x in kwargs.items() if key in self.arg_names}
        options = {key: x for key, x in kwargs.items() if key not in self.arg_names}
        seen.append(Launch(self.fn.__name__, named, options, result))
        return result

    with mock.patch.object(kind, "run", run):
        yield seen
