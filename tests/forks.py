"""The command line in forked processes: real exits and real kills, without importing everything again each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: the signal that killed it), and what it printed."""

    code: int
    out: str
    err: str


class Forks:
    """A process that has imported everything and forks for each command; a context manager.

    Args:
        folder: for what the commands print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(self, *argv: object, fault: str = "", seconds: float | None = None) -> Ended:
        """`seppo-fast ARGV` with `SEPPO_FAULT`; killed after `seconds` where they are given."""
        assert self._server.stdin is not None and self._server.stdout is not None
        out, err = self._folder / "out.txt", self._folder / "err.txt"
        order = {
            "argv": [str(word) for word in argv], "fault": fault, "out": str(out), "err": str(err), "seconds": seconds,
        }  # fmt: skip
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        return Ended(code, out.read_text(), err.read_text())


def _serve() -> None:
    import seppo_fast.trainer  # noqa: F401 - what takes the time
    from seppo_fast.cli import main
    from seppo_fast.quiet import quiet_libraries

    quiet_libraries()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.environ["SEPPO_FAULT"] = order["fault"]
            code = 70
            try:
                code = main(order["argv"])
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(_ended(child, order["seconds"])), flush=True)


def _ended(child: int, seconds: float | None) -> int:
    """Exit code of a child, which is killed after `seconds`."""
    import signal
    import threading

    done = threading.Event()

    def kill() -> None:
        if not done.wait(seconds):
            os.kill(child, signal.SIGKILL)

    if seconds is not None:
        threading.Thread(target=kill, daemon=True).start()
    _, status = os.waitpid(child, 0)
    done.set()
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    _serve()
