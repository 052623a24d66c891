"""`python -m benchmarks.ablation`: does SePPO help, and at what cost? Methods and regimes on the embedded world.

Each run is trained once, judged after the updates that its row names, and used in all tables. The work is divided into
runs of some minutes. Each writes a file when it is finished, so rerunning the command continues with the missing ones;
`--minutes` ends it early. The studies in order: `rates` (which learning rate each row trains at, on a development
seed), `table`, `regimes`; without `--study` all three run. The tables are rebuilt from all finished runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablations.base import BASE, run_base
from benchmarks.ablations.piece import FULL, QUICK, Size, run_piece
from benchmarks.ablations.rows import STUDIES, Piece, pieces
from benchmarks.ablations.tables import best_rates, tables
from benchmarks.harness.work import Task, Work, add_arguments, carry_out
from seppo_fast.utils.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
PIECES = RESULTS / "ablation"


class Ablation(Work):
    """The finished and the missing pieces of the ablation.

    Args:
        results: folder with one file per finished piece.
        scratch: folder for runs, caches and written data.
        size: how much work each piece does.

    Raises:
        ConfigError: `results` or `scratch` cannot be a folder.
    """

    def __init__(self, results: Path, scratch: Path, size: Size) -> None:
        super().__init__("ablation", results, scratch)
        self._size = size

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

    def train(self, work: Sequence[Piece], workers: int, until: float) -> None:
        """Runs pieces, and judges the base first if that is missing; see `Work.run`."""
        results = str(self.results)
        tasks = [Task(BASE, run_base, (results, self._size), usual=False)] if BASE not in self.finished() else []
        tasks += [Task(piece.name, run_piece, (piece, str(self.scratch), results, self._size)) for piece in work]
        self.run(tasks, workers, until)


def main(words: list[str] | None = None) -> int:
    """Runs what is missing of the ablation and writes its tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, action="append", help="study to run; may be repeated; default: all")
    add_arguments(parser, PIECES, Path("runs/ablation"), RESULTS / "ablation.json")
    return carry_out(parser, words, proceed, quick)


def proceed(arguments: argparse.Namespace, until: float) -> int:
    """Runs the missing pieces of the requested studies, as far as time allows, and writes the tables."""
    work = Ablation(arguments.results, arguments.scratch, FULL)
    for study in arguments.study or STUDIES:
        work.train(work.missing(study), arguments.workers, until)
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
    work = Ablation(folder / "results", folder, QUICK)
    work.train([piece for piece in pieces("rates", {}) if piece.row == "seppo"], workers, float("inf"))
    some = best_rates(work.finished(), rows=("seppo",))
    assert some is not None
    table = [Piece("table", row, some["seppo"], 1) for row in ("sft", "seppo", "random-sign", "spin-safeguard")]
    work.train([*table, Piece("regimes", "seppo", some["seppo"], 1, "after-sft")], workers, float("inf"))
    made = tables(work.finished())
    (folder / "ablation.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder / 'ablation.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
