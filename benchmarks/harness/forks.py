"""Runs the command line in forked processes: with real exits and kills, but without repeating the imports each time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code; negative: the signal that killed it.
        out: what it printed to stdout.
        err: what it printed to stderr.
        seconds: how long it took from the fork on.
        times: when each line of `out` arrived, in seconds after the fork.
    """

    code: int
    out: str
    err: str
    seconds: float
    times: tuple[float, ...]


class Server:
    """A single-threaded helper process that keeps its imports and answers requests; a context manager.

    Args:
        module: the module to run, which answers each line of JSON on stdin with one on stdout.
        environment: additional environment variables of the process.
    """

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self._module, self._environment = module, environment or {}

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-m", self._module],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **self._environment},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def ask(self, order: Any) -> Any:
        """Sends a request and returns the answer."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


class Forks(Server):
    """Runs each command in a fork of a helper process.

    Args:
        folder: a folder for the commands' stderr.
        environment: additional environment variables of the commands.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        super().__init__("benchmarks.harness.forks", environment)
        self._folder = folder

    def run(
        self,
        *argv: object,
        fault: str = "",
        seconds: float | None = None,
        lines: int | None = None,
        out: str | None = None,
    ) -> Ended:
        """Runs `seppo-fast ARGV` with the environment variable `SEPPO_FAULT` set to `fault`.

        Args:
            argv: the arguments of the command.
            fault: the fault to inject, see `seppo_fast.utils.fault_injection`.
            seconds: time after which it is killed; None: never.
            lines: number of lines on its stdout after which the pipe is closed; None: all are read.
            out: a file to use as its stdout; None: a pipe.
        """
        err = self._folder / "err.txt"
        words = [str(word) for word in argv]
        order = {"argv": words, "fault": fault, "err": str(err), "seconds": seconds, "lines": lines, "out": out}
        ended = self.ask(order)
        return Ended(ended["code"], ended["out"], err.read_text(), ended["seconds"], tuple(ended["times"]))


def _serve() -> None:
    from seppo_fast.utils.logging import quiet_libraries

    quiet_libraries()
    import seppo_fast.train.trainer  # noqa: F401 - the slow import

    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if not child:
            os.close(reading)
            os.dup2(writing if order["out"] is None else os.open(order["out"], os.O_WRONLY), 1)
            os.close(writing)
            os.dup2(os.open(order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
            os.environ["SEPPO_FAULT"] = order["fault"]
            _run(order["argv"])
        os.close(writing)
        with _killed_after(child, order["seconds"]):
            out, times = [], []
            with open(reading, encoding="utf-8", errors="replace") as printed:
                for text in printed:
                    out.append(text)
                    times.append(time.monotonic() - began)
                    if len(out) == order["lines"]:
                        break
            _, status = os.waitpid(child, 0)
        seconds = time.monotonic() - began
        ended = {"code": os.waitstatus_to_exitcode(status), "out": "".join(out), "times": times, "seconds": seconds}
        print(json.dumps(ended), flush=True)


def _run(argv: list[str]) -> NoReturn:
    """Runs the command line in this process, and ends the process with its exit code."""
    from seppo_fast.cli import main

    code = 70
    try:
        code = main([os.fsdecode(word.encode()) for word in argv])  # decoded as by the interpreter in this locale
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def _killed_after(child: int, seconds: float | None) -> Iterator[None]:
    """Kills a child after `seconds`, unless the block, which waits for the child, has ended by then."""
    done = threading.Event()

    def kill() -> None:
        if not done.wait(seconds):
            os.kill(child, signal.SIGKILL)

    if seconds is not None:
        threading.Thread(target=kill, daemon=True).start()
    try:
        yield
    finally:
        done.set()


if __name__ == "__main__":
    _serve()
