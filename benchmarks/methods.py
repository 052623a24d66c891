"""`python -m benchmarks.methods`: all training methods on the embedded world, at equal budgets.

Each method trains once per seed, and its run is read where it has used up a budget: trained pairs (or steps), generated
samples, rows through the network. The work is divided into runs of some minutes. Each writes a file when it is
finished, so rerunning the command continues with the missing ones; `--minutes` ends it early. First come three learning
rates per method on a development seed (`--study rates`), then the table on three other seeds and other prompts. Rows
that `benchmarks.ablation` trained are read from its results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.ablation import PIECES as ABLATION
from benchmarks.ablation import RESULTS
from benchmarks.comparison.piece import BASE, run_base, run_piece
from benchmarks.comparison.rows import ROWS, STUDIES, Piece, pieces
from benchmarks.comparison.tables import best_rates, tables
from benchmarks.harness.work import Task, Work, add_arguments, carry_out
from seppo_fast.utils.errors import ConfigError

PIECES = RESULTS / "methods"


def main(words: list[str] | None = None) -> int:
    """Runs what is missing of the comparison and writes its tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, action="append", help="study to run; may be repeated; default: all")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), help="train only these methods; default: all")
    add_arguments(parser, PIECES, Path("runs/methods"), RESULTS / "methods.json")
    return carry_out(parser, words, proceed, quick)


def proceed(arguments: argparse.Namespace, until: float) -> int:
    """Runs the missing pieces of the requested studies, as far as time allows, and writes the tables."""
    work = Work("comparison", arguments.results, arguments.scratch)
    wanted = arguments.rows or list(ROWS)
    for study in arguments.study or STUDIES:
        run(work, missing(work, study, wanted), arguments.workers, until)
        if left := missing(work, study, wanted):
            print(f"{study}: {len(left)} runs left; rerun the same command to continue")
            break
    finished = work.finished()
    if BASE in finished:
        made = tables(finished, Work("ablation", ABLATION, arguments.scratch).finished())
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")
    return 0


def missing(work: Work, study: str, rows: list[str]) -> list[Piece]:
    """Returns the pieces of a study that are not finished, of the given rows.

    Raises:
        ConfigError: the study needs the learning rates of these rows, and some are not known yet.
    """
    done = work.finished()
    rates = best_rates(done)
    unknown = [row for row in rows if row not in rates]
    if study != "rates" and unknown:
        raise ConfigError(
            f"--study {study} needs the learning rates of {', '.join(unknown)}; run --study rates to its end first"
        )
    every = pieces(study, rates | dict.fromkeys(set(ROWS) - set(rates), 0.0))
    return [piece for piece in every if piece.row in rows and piece.name not in done]


def run(work: Work, some: list[Piece], workers: int, until: float, small: bool = False) -> None:
    """Runs pieces, and judges the base first if that is missing."""
    results, scratch = str(work.results), str(work.scratch)
    tasks = [Task(BASE, run_base, (results, small), usual=False)] if BASE not in work.finished() else []
    work.run([*tasks, *(Task(one.name, run_piece, (one, scratch, results, small)) for one in some)], workers, until)


def quick(folder: Path, workers: int) -> int:
    """Runs tiny pieces and makes tables from them."""
    work = Work("comparison", folder / "results", folder)
    some = [Piece("rates", "nft", rate, 100) for rate in ROWS["nft"].rates]
    some += [Piece("table", row, 1e-5, 1) for row in ("nft", "grpo", "ditto")]
    run(work, some, workers, float("inf"), small=True)
    made = tables(work.finished(), {})
    (folder / "methods.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder / 'methods.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
