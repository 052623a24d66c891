"""Fault points: named places at which a test can make a run fail; outside tests they do nothing."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hup": signal.SIGHUP}
_passed: Counter[str] = Counter()


def fault(name: str) -> None:
    """Fails at this point if the environment variable `SEPPO_FAULT` says so.

    The variable is `NAME=kill` (SIGKILL), `NAME=term` or `NAME=hup` (SIGTERM, SIGHUP: interruptions), `NAME=full`
    (disk full), `NAME=memory` (out of memory), `NAME=error` (a RuntimeError) or `NAME=sleep:SECONDS`. The fault happens
    the first time that the process passes this point; with `NAME@3=...` the third time, with `NAME@3+=...` the third
    time and each time after it. Faults for different names are separated by commas.

    Raises:
        OSError, RuntimeError, MemoryError: as `SEPPO_FAULT` requests.
        ValueError: `SEPPO_FAULT` names an unknown fault.
    """
    wanted = os.environ.get("SEPPO_FAULT")
    if not wanted:
        return
    orders = [order.partition("=") for order in wanted.split(",")]
    mine = next(((place, what) for place, _, what in orders if place.partition("@")[0] == name), None)
    if mine is None:
        return
    (_, _, time_of), what = mine[0].partition("@"), mine[1]
    _passed[name] += 1
    first = int(time_of.removesuffix("+") or 1)
    if _passed[name] < first or (_passed[name] > first and not time_of.endswith("+")):
        return
    kind, _, seconds = what.partition(":")
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "error":
        raise RuntimeError(f"fault {name}")
    elif kind == "memory":
        raise MemoryError(f"fault {name}")
    elif kind == "sleep":
        time.sleep(float(seconds))
    else:
        raise ValueError(f"SEPPO_FAULT: {what!r} is unknown; use kill, term, hup, full, error, memory or sleep:SECONDS")
