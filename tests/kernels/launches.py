"""Launches seen from inside: which kernels, with which arguments."""

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
        kernel: its name.
        arguments: the kernel's, by name.
        options: all else that was passed: the grid, warps, whether products and sums are contracted.
        result: what Triton's own `run` returned, or `around`.
    """

    kernel: str
    arguments: dict[str, Any]
    options: dict[str, Any]
    result: Any


@contextmanager
def launches(
    around: Callable[[Callable[..., Any]], Any] = lambda run: run(), **replaced: Any
) -> Iterator[list[Launch]]:
    """The launches made meanwhile, of kernels compiled or interpreted.

    Args:
        around: called in place of each launch, with the function that does it; that takes more options to replace.
        replaced: arguments of Triton's `run` to replace.
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
