"""`seppo-fast report RUN --watch`: keeps a run's page up to date until the run is finished."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from seppo_fast.commands.report import NAME, planned_updates, report
from seppo_fast.runs.folder import is_begun
from seppo_fast.runs.journal import LOG
from seppo_fast.runs.signals import interrupting
from seppo_fast.runs.weights import written_after
from seppo_fast.utils.logging import say

SECONDS = 10.0  # between two looks at the log


def watch(
    run: Path,
    output: Path | None = None,
    tell: Callable[[str], object] = say,
    wait: Callable[[float], object] = time.sleep,
) -> Path:
    """Writes a run's page whenever its log has changed, until the run is finished.

    A run that was interrupted or failed is not finished: once it is resumed, the page follows it again. Before a run's
    first update there is no log, so this waits for it.

    Args:
        run: the run's folder.
        output: the file; None: `report.html` in the run's folder.
        tell: receives lines for the user.
        wait: called with a number of seconds between two looks at the log.

    Returns:
        The file.

    Raises:
        ConfigError: see `report`.
        Interrupted: SIGTERM or SIGHUP arrived.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    file = output or run / NAME
    begins = (
        f"report: {file}, rewritten every {SECONDS:g} seconds while the log grows, without further lines; ends with "
        "the run, or press Ctrl-C"
    )
    waits = f"{run / LOG} does not exist yet; waiting for the run's first update"
    shown: tuple[int, int, int] | None = None
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            tell(line)

    with interrupting():
        while True:
            finished = _is_finished(run)  # before the log is read, so that the last page shows all of it
            state = _log_state(run)
            if state is None and not finished and is_begun(run):
                once(begins)
                once(waits)
            elif state is None or state != shown or finished:
                report(run, output, say=lambda line: None)
                shown = state
                once(begins)
            if finished:
                tell(f"the run is finished; its final report: {file}")
                return file
            wait(SECONDS)


def _is_finished(run: Path) -> bool:
    """Returns whether the run has written its weights after its last update."""
    updates = planned_updates(run)
    return updates is not None and written_after(run / "weights") == updates


def _log_state(run: Path) -> tuple[int, int, int] | None:
    """Returns values that change whenever the log is appended to or replaced; None if it does not exist."""
    try:
        found = os.stat(run / LOG)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
