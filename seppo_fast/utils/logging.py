"""Printing: which process prints, silencing of libraries, and streams whose failure does not end a run."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_rank, _world, _says = 0, 1, True


def set_rank(rank: int, world: int, first: bool) -> None:
    """Sets this process's rank, the number of processes, and whether it is the first process of its machine."""
    global _rank, _world, _says
    _rank, _world, _says = rank, world, first


def say(line: str) -> None:
    """Prints a line that is the same in all processes; only the first process of each machine prints it."""
    if _says:
        print(line, flush=True)


def warn(line: str) -> None:
    """Prints a warning about this process, prefixed with its rank if the run has several processes."""
    print(f"process {_rank}: {line}" if _world > 1 else line, flush=True)


def on_terminal() -> bool:
    """Returns whether progress bars may be drawn: only by rank 0, and only if stdout and stderr are both a terminal.

    If only stdout is piped, a bar on stderr would mix with lines that `| tee` prints on the same terminal.
    """
    return _rank == 0 and all(_is_terminal(stream) for stream in (sys.stdout, sys.stderr))


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):  # ValueError: the stream is closed
        return False


class _Tolerant:
    """Wraps a text stream: escapes characters that it cannot encode, and discards all output once it fails."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as problem:  # ValueError: the stream is closed
            self._give_up(problem)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as problem:
            self._give_up(problem)

    def _give_up(self, problem: Exception) -> None:
        """Redirects the stream and its buffer to /dev/null; says so on stderr, unless the reader of a pipe left."""
        if self._lost:
            return
        self._lost = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # else the interpreter's flush at exit would fail
            os.close(nowhere)
        if getattr(problem, "errno", None) != errno.EPIPE and self._stream is not sys.__stderr__:
            print(f"seppo-fast: output can no longer be printed: {problem}", file=sys.stderr)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Makes stdout and stderr tolerant inside the block: printing to them raises no error."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Tolerant) else _Tolerant(stream)  # type: ignore[assignment]
        for stream in before
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # writing what is buffered may fail, while errors are still suppressed
        sys.stdout, sys.stderr = before


def quiet_libraries() -> None:
    """Makes transformers and diffusers log errors only, and hides libraries' progress bars except for downloads.

    Also hides a warning of huggingface_hub about an argument that diffusers, not the user, passes to it. Bars of
    downloads are shown only on a terminal. Call this before anything imports these libraries, since they read the
    environment on import. Environment variables that the user has set are kept.
    """
    downloads = on_terminal() and os.environ.get("RANK", "0") == "0"  # set by launchers; `set_rank` is called later
    asked = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    values = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if not downloads:
        values |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in values.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated", UserWarning)
    from diffusers.utils import logging  # only now, because it reads the environment on import

    logging.disable_progress_bar()
    if not asked:
        _limit_hub_bars(downloads)


def _limit_hub_bars(downloads: bool) -> None:
    """Turns off the progress bars of huggingface_hub and transformers, except the hub's downloads if `downloads`.

    transformers shows its own bars ("Loading weights") unless all of the hub's bars are off when it is imported. The
    hub's downloads belong to a named group of bars, which can then be turned on again separately.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()  # it was imported while the hub's bars were on
    if downloads:
        enable_progress_bars("huggingface_hub")
