"""SIGINT, SIGTERM, SIGHUP and SIGUSR1: a run ends at the next micro-batch, in a state that can be saved.

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
    """A run was asked to end; the message says where it stands."""


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C inside the block takes effect after it, a second one at once; for imports.

    One that is raised while a library's `__del__` runs would be printed and lost, and the run would go on.
    """
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as a shell's background jobs have it
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
    """Remembers a signal until a place where a run may end.

    A run of one process ends at its next micro-batch, and a second signal does what it does by default, which is to end
    it at once. Several processes must end after the same update, so they agree on it there, and further signals, which
    launchers send, change nothing. A context manager; outside of a program's main thread it leaves signals alone, and
    one that is ignored stays ignored: `nohup` has a run outlive its terminal.

    Args:
        alone: whether the run has one process.
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
        """To be called where the trained state is that of the last finished update; does nothing in one of several.

        Raises:
            Interrupted: a signal came.
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
            warn(f"{name}: ending at the next micro-batch; a second one ends at once")
        else:
            warn(f"{name}: ending after this update")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
