"""A call in a process of its own, which may crash, hang or break a GPU's context without harm to the caller."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

# A fork has everything imported already. But importing diffusers asks whether there is a GPU, which starts CUDA's
# driver in builds for CUDA, and a driver does not survive a fork.
METHOD = "fork" if torch.version.cuda is None else "spawn"
_GOODBYE = 5.0  # seconds that a process has to end once it has answered


class Broken(Exception):
    """The call did not return; the message says why, in one line."""


def isolated(call: Callable[..., Any], *arguments: Any, seconds: float, log: Path | None = None) -> Any:
    """Returns what a call returns.

    Args:
        call: a function of a module.
        arguments: of the call; they and what it returns can be pickled.
        seconds: after which its process is killed.
        log: a file for what it prints; None: it prints where the caller does.

    Raises:
        Broken: it raised an error, its process ended, or the time is over.
    """
    context = multiprocessing.get_context(METHOD)
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(writing, call, arguments, log))  # type: ignore[attr-defined]
    process.start()
    writing.close()
    try:
        if not reading.poll(seconds):
            raise Broken(f"killed after {seconds:.0f} s")
        returned, problem = reading.recv()
        process.join(_GOODBYE)
    except EOFError:
        process.join()
        raise Broken(f"its process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if problem is not None:
        raise Broken(problem)
    return returned


def _answer(writing: Connection, call: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None) -> None:
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # A fork may have put others in their place.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    try:
        writing.send((call(*arguments), None))
    except BaseException as error:
        traceback.print_exc()
        first = next(iter(str(error).splitlines()), "")
        writing.send((None, f"{type(error).__name__}: {first}"))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
