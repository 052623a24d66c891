"""What is printed: by which process, nothing of the libraries' own, and never an end of the run by it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_rank, _world, _says = 0, 1, True


def set_rank(rank: int, world: int, first: bool) -> None:
    """Tells which of how many processes this is, and whether it is the first of its machine, once they are known."""
    global _rank, _world, _says
    _rank, _world, _says = rank, world, first


def say(line: str) -> None:
    """Prints a line of the run, which is the same in all processes: the first one of each machine prints it."""
    if _says:
        print(line, flush=True)


def warn(line: str) -> None:
    """Prints what befell this process, with its rank where there are several."""
    print(f"process {_rank}: {line}" if _world > 1 else line, flush=True)


def on_terminal() -> bool:
    """Returns whether progress bars may be drawn here: by rank 0, where stdout and stderr both are a terminal.

    Beside a piped stdout a bar would run into the lines that `| tee` brings back to the terminal.
    """
    return _rank == 0 and all(_is_terminal(stream) for stream in (sys.stdout, sys.stderr))


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):  # ValueError: it was closed
        return False


class _Tolerant:
    """A text stream that shows what it can: missing letters are escaped, and a stream that fails is given up."""

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
        except (OSError, ValueError) as problem:  # ValueError: it was closed
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
        """From now on the stream's lines go nowhere, those that it still holds included."""
        if self._lost:
            return
        self._lost = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # else the interpreter would fail when it flushes at its end
            os.close(nowhere)
        if getattr(problem, "errno", None) != errno.EPIPE and self._stream is not sys.__stderr__:
            print(f"seppo-fast: what is printed cannot be shown from here on: {problem}", file=sys.stderr)


@contextmanager
def tolerant_output() -> Iterator[None]:
    """Inside the block nothing that is printed, to stdout or stderr, raises an error."""
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
                stream.flush()  # what is still held may be what cannot be written
        sys.stdout, sys.stderr = before


def quiet_libraries() -> None:
    """Limits transformers and diffusers to errors; of all libraries' progress bars a terminal shows downloads alone.

    Call it before anything imports them: they read the environment when they are imported. Values that the user has set
    in the environment are kept.
    """
    downloads = on_terminal() and os.environ.get("RANK", "0") == "0"  # a launcher's variable; no rank is set yet
    asked = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ
    values = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if not downloads:
        values |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for name, value in values.items():
        os.environ.setdefault(name, value)
    from diffusers.utils import logging  # after the environment is set: it reads it when it is imported

    logging.disable_progress_bar()
    if not asked:
        _limit_hub_bars(downloads)


def _limit_hub_bars(downloads: bool) -> None:
    """Turns off the progress bars of huggingface_hub and transformers, except the hub's downloads if `downloads`.

    transformers shows its own ("Loading weights") unless the hub's are off altogether when it is imported. The hub's
    downloads name a group of theirs, which can be turned on all the same.
    """
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()  # imported earlier, it has not seen that the hub's are off
    if downloads:
        enable_progress_bars("huggingface_hub")
