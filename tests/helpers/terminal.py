"""Terminals for tests: a stream that claims to be one, a model of the screen, and processes on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = 200  # so that no line of a run is wrapped


class Terminal(io.StringIO):
    """A stream that claims to be a terminal and keeps everything written."""

    encoding = "utf-8"

    def isatty(self):
        return True


def screen(written: str) -> list[str]:
    """Returns the lines that a terminal shows after `written`, without trailing spaces and empty lines at the end."""
    lines, row, column = [""], 0, 0
    for letter in written:
        if letter == "\r":
            column = 0
        elif letter == "\n":  # a real terminal's driver has inserted a \r before it
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            if column == COLUMNS:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row].ljust(column)[:column] + letter + lines[row][column + 1 :]
            column += 1
    shown = [line.rstrip() for line in lines]
    while shown and not shown[-1]:
        del shown[-1]
    return shown


class OnTerminal:
    """A process whose three streams are a pseudo-terminal, which is also its controlling terminal."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self._terminal = terminal
        self._written = b""

    def read(self, until: str | None = None) -> str:
        """Reads until the text `until` was written, or to the end if it is None; returns everything written so far."""
        while until is None or until.encode() not in self._written:
            try:
                piece = os.read(self._terminal, 1 << 16)
            except OSError:  # Linux reports EIO once the other end is closed
                piece = b""
            if not piece:
                assert until is None, f"{until!r} was not written: {self._written!r}"
                break
            self._written += piece
        return self._written.decode()

    def type(self, letters: bytes) -> None:
        """Types letters into the terminal; `\\x03` is Ctrl-C."""
        os.write(self._terminal, letters)


def _own_terminal() -> None:
    """Makes standard input the controlling terminal, and Ctrl-C work even if these tests run in a background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and children inherit that
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def on_terminal(*arguments: object, environment: Mapping[str, str] | None = None) -> Iterator[OnTerminal]:
    """Runs `python ARGUMENTS` on a pseudo-terminal of `COLUMNS` columns; kills it at the end of the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    # Commands that earlier tests ran in this process, without a terminal, have set these variables.
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_DISABLE_PROGRESS_BARS")}
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", **(environment or {})},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield OnTerminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
