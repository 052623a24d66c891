"""Handles SIGINT, SIGTERM, SIGHUP and SIGUSR1: the run ends at the next micro-batch, where its state can be saved.

A command that has nothing to save ends at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from seppo_fast.utils.logging import warn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message says after which update."""


@contextmanager
def defer_sigint() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block; a second Ctrl-C takes effect at once. Meant for imports.

    A KeyboardInterrupt that is raised while a library's `__del__` runs is printed and lost, and the run would continue.
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in a shell's background jobs
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextmanager
def interrupting() -> Iterator[None]:
    """SIGTERM and SIGHUP inside the block raise `Interrupted` at once: for commands that have nothing to save.

    Signals that are ignored stay ignored, and outside of a program's main thread they are left alone.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted("interrupted")

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interruption:
    """Remembers a signal until the run reaches a point where it may end; a context manager.

    A run of one process ends at its next micro-batch; a second signal has its default effect and ends the run at once.
    Several processes must end after the same update, so they agree on it after each one, and further signals (launchers
    send them) have no effect. Outside the program's main thread no handler is installed. Signals that are ignored stay
    ignored, so a run under `nohup` outlives its terminal.

    Args:
        alone: whether the run has only one process.

    Attributes:
        asked: whether a signal has arrived.
    """

    def __init__(self, alone: bool = True) -> None:
        self._alone = alone
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._remember) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def check(self) -> None:
        """Ends a run of one process if a signal has arrived; with several processes it does nothing.

        Must be called only where the trained weights are those of the last finished update.

        Raises:
            Interrupted: a signal has arrived.
        """
        if self.asked and self._alone:
            raise Interrupted("interrupted")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            return
        self.asked = True
        name = signal.Signals(number).name
        if self._alone:
            self._give_back()
            warn(f"{name}: ending at the next micro-batch; a second signal ends the run at once")
        else:
            warn(f"{name}: ending after this update")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
