"""Runs a call in a process of its own, so that crashes, hangs and broken GPU contexts do not harm the caller."""

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

# Forking avoids repeating the imports. But importing diffusers checks for a GPU, which initializes the CUDA driver in
# CUDA builds, and an initialized driver does not survive a fork.
METHOD = "fork" if torch.version.cuda is None else "spawn"
_GOODBYE = 5.0  # seconds that a process has to exit after its answer


class Broken(Exception):
    """Raised when the call did not return; the one-line message says why."""


def isolated(call: Callable[..., Any], *arguments: Any, seconds: float, log: Path | None = None) -> Any:
    """Runs a call in a process of its own and returns its result.

    Args:
        call: a module-level function.
        arguments: the call's arguments; they and the result must be picklable.
        seconds: the time limit, after which the process is killed.
        log: a file for the process's output; None: the output goes where the caller's goes.

    Raises:
        Broken: the call raised an error, its process ended, or the time limit was reached.
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
        # In a fork they may be objects that the parent had put in their place.
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
