"""Shows the progress of long work: as a bar on a terminal, elsewhere as a line at most every ten seconds."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TextIO

from tqdm import tqdm

from seppo_fast.utils.logging import on_terminal, say

_LINE_SECONDS = 10.0
_MARGIN = 4  # columns left free: text in the last column would wrap, and the terminal echoes ^C after the bar


@contextmanager
def progress(total: int, done: str, unit: str, initial: int = 0) -> Iterator[Callable[[int], None]]:
    """Shows the progress of the work inside the block.

    On a terminal a bar is drawn below whatever is printed meanwhile, and erased at the end of the block, also after an
    exception. Elsewhere lines such as `encoded 120/4000  33.1 examples/s  eta 2 m` are printed, at most every ten
    seconds, so none if the work takes less than that.

    Args:
        total: the number of items.
        done: a participle that says what has been done to the counted items, such as `encoded`.
        unit: the plural noun for the items, such as `examples`.
        initial: the number of items done before the block.

    Yields:
        A function to call with the number of items done since the last call.
    """
    if not on_terminal():
        yield _Lines(total, done, unit, initial).advance
        return
    before = sys.stdout, sys.stderr
    bar = _Bar(total, done, unit, initial, sys.stderr)
    above = [_AboveBar(stream, bar) for stream in before]
    try:
        sys.stdout, sys.stderr = above  # type: ignore[assignment]
        yield bar.advance
    finally:
        sys.stdout, sys.stderr = before
        bar.close()
        for stream in above:
            stream.release()


def duration(seconds: float) -> str:
    """Returns a number of seconds as text: `45 s`, `12 m`, `3.4 h`, or from two days on `5.2 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} m"
    days = seconds / 86400
    if days < 2:
        return f"{seconds / 3600:.1f} h"
    return f"{days:.1f} days" if days < 100 else f"{days:.0f} days"


class _Lines:
    """Prints a line at most every ten seconds; see `progress` for the arguments."""

    def __init__(self, total: int, done: str, unit: str, initial: int) -> None:
        self._total, self._done, self._unit = total, done, unit
        self._initial = self._count = initial
        self._start = self._last = monotonic()

    def advance(self, count: int = 1) -> None:
        self._count += count
        now = monotonic()
        if now - self._last < _LINE_SECONDS:
            return
        self._last = now
        rate = (self._count - self._initial) / (now - self._start)
        left = duration((self._total - self._count) / rate)
        shown = f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
        say(f"{self._done} {self._count}/{self._total}  {shown} {self._unit}/s  eta {left}")


class _Meter(tqdm):
    """A tqdm bar that follows the terminal's width, without the monitor thread, which would ignore `_Bar`'s lock."""

    monitor_interval = 0

    def display(self, *arguments: Any, **keywords: Any) -> Any:
        self.ncols = max(1, _columns() - _MARGIN)
        return super().display(*arguments, **keywords)


# By default tqdm creates a multiprocessing lock, for which some start methods launch a further process.
_Meter.set_lock(threading.RLock())


class _Bar:
    """A bar in the terminal's last line; see `progress` for the other arguments.

    Its lock is held while anything is drawn. The lock is reentrant, because a signal handler may print during drawing;
    `hidden` may therefore be nested, and only the outermost one redraws the bar.

    Args:
        stream: the stream of the terminal.
    """

    def __init__(self, total: int, done: str, unit: str, initial: int, stream: TextIO) -> None:
        self.lock = threading.RLock()
        self._stream = stream
        self._hidden = 0
        self._meter = _Meter(
            total=total,
            desc=done,
            unit=f" {unit}",
            initial=initial,
            file=stream,
            leave=False,
            miniters=1,  # check the clock at every item, because some items take a thousand times as long as others
            position=0,
            nrows=2,  # else no bar would appear on terminals that report no size, as in some containers
        )

    def advance(self, count: int = 1) -> None:
        with self.lock:
            self._meter.update(count)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Erases the bar during the block, so that its line can be used, and redraws it at the end."""
        with self.lock:
            self._hidden += 1
            self._erase()
            try:
                yield
            finally:
                self._hidden -= 1
                if not self._hidden:
                    self._meter.refresh(nolock=True)

    def close(self) -> None:
        with self.lock:
            self._erase()
            self._meter.close()

    def _erase(self) -> None:
        """Overwrites the whole line with spaces: tqdm's own erasing would leave an echoed ^C behind the bar."""
        self._stream.write(f"\r{' ' * (_columns() - 1)}\r")
        self._stream.flush()


class _AboveBar:
    """A text stream that prints complete lines above a bar, and buffers an incomplete one until its newline arrives."""

    def __init__(self, stream: TextIO, bar: _Bar) -> None:
        self._stream, self._bar = stream, bar
        self._rest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        """Returns False, so that no second bar is drawn, by nested work or by a library."""
        return False

    def write(self, text: str) -> int:
        with self._bar.lock:
            lines, newline, self._rest = (self._rest + text).rpartition("\n")
            if newline:
                with self._bar.hidden():
                    self._stream.write(lines + newline)
                    self._stream.flush()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def release(self) -> None:
        """Prints the buffered incomplete line; call it once the bar is erased."""
        self._stream.write(self._rest)


def _columns() -> int:
    return shutil.get_terminal_size().columns
