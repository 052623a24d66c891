"""`python -m benchmarks.ablation`: does SePPO help, and at what cost? Methods and regimes on the embedded world.

Each run is trained once, judged after the updates that its row names, and used in all tables. The work is divided into
runs of some minutes. Each writes a file when it is finished, so rerunning the command continues with the missing ones;
`--minutes` ends it early. The studies in order: `rates` (which learning rate each row trains at, on a development
seed), `table`, `regimes`; without `--study` all three run. The tables are rebuilt from all finished runs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.ablations.base import BASE, run_base
from benchmarks.ablations.piece import FULL, QUICK, Size, run_piece
from benchmarks.ablations.rows import STUDIES, Piece, pieces
from benchmarks.ablations.tables import best_rates, tables
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import free_name

RESULTS = Path(__file__).parent / "results"
PIECES = RESULTS / "ablation"


class Work:
    """The finished and the missing pieces of the ablation.

    Args:
        results: folder with one file per finished piece.
        scratch: folder for runs, caches and written data.
        size: how much work each piece does.

    Raises:
        ConfigError: `results` or `scratch` cannot be a folder.
    """

    def __init__(self, results: Path, scratch: Path, size: Size) -> None:
        self._results, self._scratch, self._size = results, scratch, size
        for name, folder in {"--results": results, "--scratch": scratch}.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise ConfigError(f"{name} {folder}: {problem.strerror}") from problem

    def finished(self) -> dict[str, dict[str, Any]]:
        """Returns the results of the finished pieces by name, including the base.

        Raises:
            ConfigError: a file is not a result of the ablation.
        """
        return {file.stem: _result(file) for file in sorted(self._results.glob("*.json"))}

    def missing(self, study: str) -> list[Piece]:
        """Returns the pieces of a study that are not finished.

        Raises:
            ConfigError: the study needs the learning rates, and some are not known yet.
        """
        done = self.finished()
        rates = {} if study == "rates" else best_rates(done)
        if rates is None:
            raise ConfigError(f"--study {study} needs the learning rates; run --study rates to its end first")
        return [piece for piece in pieces(study, rates) if piece.name not in done]

    def run(self, work: Sequence[Piece], workers: int, until: float) -> None:
        """Runs pieces, `workers` at a time with one thread each.

        Args:
            work: the pieces to run.
            workers: number of processes.
            until: a time of `time.monotonic`; no piece is started that is expected to end later.

        Raises:
            ConfigError: another process works in the same folder.
        """
        with (self._scratch / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--scratch {self._scratch}: another ablation is running in this folder") from None
            self._run(list(work), workers, until)

    def _run(self, left: list[Piece], workers: int, until: float) -> None:
        done, running = self.finished(), dict[Future[None], str]()
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            if BASE not in done:
                running[pool.submit(run_base, str(self._results), self._size)] = BASE
            while left or running:
                took = [piece["seconds"] for name, piece in self.finished().items() if name != BASE]
                expected = statistics.median(took) if took else 0.0
                while left and len(running) < workers and time.monotonic() + expected < until:
                    piece = left.pop(0)
                    future = pool.submit(run_piece, piece, str(self._scratch), str(self._results), self._size)
                    running[future] = piece.name
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    future.result()  # an exception in a piece ends the work; pieces that are running still finish
                    seconds = _result(self._results / f"{name}.json")["seconds"]
                    print(f"{name}: {seconds:.0f} s; {len(left)} not started", flush=True)


def _result(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if "seconds" in tree:
            return dict(tree)
    except (OSError, ValueError, TypeError) as problem:
        raise ConfigError(
            f"{file}: not a result of the ablation ({problem}); remove it to run that piece again"
        ) from None
    raise ConfigError(f"{file}: not a result of the ablation; remove it to run that piece again")


def main(words: list[str] | None = None) -> int:
    """Runs what is missing of the ablation and writes its tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, action="append", help="study to run; may be repeated; default: all")
    parser.add_argument("--minutes", type=float, default=30.0, help="start no run that would end later; 0: no limit")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=PIECES, help="folder with one file per finished run")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs/ablation"), help="folder for caches and unfinished runs"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "ablation.json", help="file to write the tables to")
    parser.add_argument("--quick", action="store_true", help="do a few tiny runs in a new folder, as a smoke test")
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


def proceed(arguments: argparse.Namespace, until: float) -> int:
    """Runs the missing pieces of the requested studies, as far as time allows, and writes the tables."""
    work = Work(arguments.results, arguments.scratch, FULL)
    for study in arguments.study or STUDIES:
        work.run(work.missing(study), arguments.workers, until)
        if left := work.missing(study):
            print(f"{study}: {len(left)} runs left; rerun the same command to continue")
            break
    finished = work.finished()
    if BASE in finished:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(tables(finished), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")
    return 0


def quick(folder: Path, workers: int) -> int:
    """Runs tiny pieces of each study and makes tables from them."""
    work = Work(folder / "results", folder, QUICK)
    work.run([piece for piece in pieces("rates", {}) if piece.row == "seppo"], workers, float("inf"))
    some = best_rates(work.finished(), rows=("seppo",))
    assert some is not None
    table = [Piece("table", row, some["seppo"], 1) for row in ("sft", "seppo", "random-sign", "spin-safeguard")]
    work.run([*table, Piece("regimes", "seppo", some["seppo"], 1, "after-sft")], workers, float("inf"))
    made = tables(work.finished())
    (folder / "ablation.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder / 'ablation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
