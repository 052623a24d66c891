"""Long measurements as pieces of some minutes: each writes a file when it is finished, so a rerun does what is left."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import free_name


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        name: the name of its result file, without suffix.
        call: does the work in a new process and writes the file.
        arguments: the arguments of `call`.
        usual: whether its duration is typical of the others.
    """

    name: str
    call: Callable[..., None]
    arguments: tuple[Any, ...]
    usual: bool = True


class Work:
    """The pieces of a measurement.

    Attributes:
        results: folder with one file per finished piece.
        scratch: folder for runs, caches and written data.

    Args:
        measurement: what is measured, for messages.
        results: see above; created if missing.
        scratch: see above; created if missing.

    Raises:
        ConfigError: `results` or `scratch` cannot be a folder.
    """

    def __init__(self, measurement: str, results: Path, scratch: Path) -> None:
        self._measurement, self.results, self.scratch = measurement, results, scratch
        for name, folder in {"--results": results, "--scratch": scratch}.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise ConfigError(f"{name} {folder}: {problem.strerror}") from problem

    def finished(self) -> dict[str, dict[str, Any]]:
        """Returns the results of the finished pieces by name.

        Raises:
            ConfigError: a file is not a result of this measurement.
        """
        return {file.stem: self._result(file) for file in sorted(self.results.glob("*.json"))}

    def run(self, tasks: Sequence[Task], workers: int, until: float) -> None:
        """Runs pieces, `workers` at a time with one thread each.

        Args:
            tasks: the pieces to run, in order.
            workers: number of processes.
            until: a time of `time.monotonic`; no piece is started that is expected to end later.

        Raises:
            ConfigError: another process works in the same folder.
        """
        with (self.scratch / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"--scratch {self.scratch}: another {self._measurement} is running in this folder"
                ) from None
            self._run(list(tasks), workers, until)

    def _run(self, left: list[Task], workers: int, until: float) -> None:
        running = dict[Future[None], Task]()
        took = [piece["seconds"] for piece in self.finished().values() if piece.get("usual", True)]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            while left or running:
                expected = statistics.median(took) if took else 0.0
                while left and len(running) < workers and time.monotonic() + expected < until:
                    task = left.pop(0)
                    running[pool.submit(task.call, *task.arguments)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    future.result()  # an exception in a piece ends the work; pieces that are running still finish
                    seconds = self._result(self.results / f"{task.name}.json")["seconds"]
                    took += [seconds] * task.usual
                    print(f"{task.name}: {seconds:.0f} s; {len(left)} not started", flush=True)

    def _result(self, file: Path) -> dict[str, Any]:
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            if "seconds" in tree:
                return dict(tree)
        except (OSError, ValueError, TypeError) as problem:
            raise ConfigError(
                f"{file}: not a result of the {self._measurement} ({problem}); remove it to run that piece again"
            ) from None
        raise ConfigError(f"{file}: not a result of the {self._measurement}; remove it to run that piece again")


def add_arguments(parser: argparse.ArgumentParser, pieces: Path, scratch: Path, tables: Path) -> None:
    """Adds the arguments that all such commands have; the paths are defaults."""
    parser.add_argument("--minutes", type=float, default=30.0, help="start no run that would end later; 0: no limit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=pieces, help="folder with one file per finished run")
    parser.add_argument("--scratch", type=Path, default=scratch, help="folder for caches and unfinished runs")
    parser.add_argument("--json", type=Path, default=tables, help="file to write the tables to")
    parser.add_argument("--quick", action="store_true", help="do a few tiny runs in a new folder, as a smoke test")


def carry_out(
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    proceed: Callable[[argparse.Namespace, float], int],
    quick: Callable[[Path, int], int],
) -> int:
    """Parses the arguments and does the work; returns the exit code.

    Args:
        parser: with the arguments of `add_arguments`.
        words: the arguments; None: those of the command line.
        proceed: does what is missing, given the arguments and the time of `time.monotonic` to end at.
        quick: does tiny pieces in a new folder, with a number of workers.
    """
    arguments = parser.parse_args(words)
    if arguments.minutes < 0 or arguments.workers < 1:
        parser.error("--minutes must be at least 0, and --workers at least 1")
    until = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    try:
        if arguments.quick:
            return quick(free_name(arguments.scratch), arguments.workers)
        return proceed(arguments, until)
    except ConfigError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return ConfigError.exit_code


def write_result(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Writes a result file atomically."""
    staging = folder / f".tmp-{name}"
    staging.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(staging, folder / f"{name}.json")
