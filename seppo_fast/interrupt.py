"""SIGINT, SIGTERM and SIGUSR1: a run ends at the next micro-batch, in a state that can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(KeyboardInterrupt):
    """A run was asked to end; the message says where it stands."""


class Interruption:
    """Remembers the first signal until `check`; the second one does what it does by default, which is to leave at once.

    A context manager; outside of a program's main thread it leaves signals alone.

    Args:
        report: takes a line when the first signal comes.
    """

    def __init__(self, report: Callable[[str], object] = print) -> None:
        self._report = report
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def check(self) -> None:
        """To be called where the trained state is that of the last finished update.

        Raises:
            Interrupted: a signal came.
        """
        if self._asked:
            raise Interrupted("interrupted")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self._give_back()
        self._report(f"{signal.Signals(number).name}: ending at the next micro-batch; a second one ends at once")

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
