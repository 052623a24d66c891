"""The benchmark driver: runs one suite, with every provider in one process and values checked before timing.

    python -m benchmarks.run --suite sampling            # on the GPU, or at reduced sizes on a CPU
    python -m benchmarks.run --suite endtoend --quick    # on a CPU, in seconds, as a smoke test
    python -m benchmarks.run --suite step --json FILE    # also writes the rows, rewritten after each case
    python -m benchmarks.run --suite kernels             # the loss alone, up to 8192 pairs on a GPU
    python -m benchmarks.run --suite cache --minutes 6   # starts no case that would end later, by counted estimates
    python -m benchmarks.run --suite score               # the phases of seppo-fast score
    python -m benchmarks.run --suite video --cases 256   # clips, only the cases whose title contains "256"

On a GPU the model is SD-1.5's architecture with random weights (859.5 M parameters, bf16, 64 x 64 latents), on a CPU
the pipeline that ships with the package, in float32; for clips both get random motion modules. A provider whose values
differ from the baseline's (in `kernels`: from float64's) gets no ratio, and the exit code is 1, as it is if a case
fails. Cases that were left out are listed on stderr and do not change the exit code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from seppo_fast.utils.logging import quiet_libraries

quiet_libraries()

if TYPE_CHECKING:
    from benchmarks.harness.measure import Machine
    from benchmarks.harness.rows import Row

SUITES = ("sampling", "step", "endtoend", "kernels", "cache", "video", "score")


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a mistake in it ends the process with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, on a CPU")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, rewritten after each case")
    parser.add_argument(
        "--cases",
        metavar="SUBSTRING",
        action="append",
        default=[],
        help="only cases whose title contains this, ignoring case; may be given several times",
    )
    parser.add_argument("--minutes", type=float, help="start no case that would end later than this")
    arguments = parser.parse_args(words)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: the folder {arguments.json.absolute().parent} does not exist")
    if arguments.json and arguments.json.exists() and not arguments.json.is_file():
        parser.error(f"--json {arguments.json}: exists and is not a regular file")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes}: must be more than 0")
    return arguments


def main(words: list[str] | None = None) -> int:
    """Runs a suite, prints its rows and writes them to the requested file; returns the exit code."""
    started = time.perf_counter()
    arguments = parsed(words)
    if arguments.quick:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate reads it when the trainer chooses its device

    from benchmarks.harness.cases import chosen, listed, run_cases
    from benchmarks.harness.measure import Machine
    from benchmarks.harness.provenance import commit, device

    machine = Machine(device(), arguments.quick)
    try:
        cases = chosen(listed(arguments.suite, machine), arguments.cases)
    except ValueError as problem:
        print(f"--cases: {problem}", file=sys.stderr)
        return 2
    left = None if arguments.minutes is None else 60 * arguments.minutes - (time.perf_counter() - started)

    def keep(rows: list[Row]) -> None:
        if arguments.json:
            write_rows(arguments.json, rows, machine)

    outcome = run_cases(cases, left, keep, estimated=machine.size == "gpu")
    print(f"{arguments.suite} on {machine.name}, {time.perf_counter() - started:.0f} s, commit {commit()}")
    for title, reason in outcome.missing.items():
        print(f"missing: {title}: {reason}", file=sys.stderr)
    wrong = [row for row in outcome.rows if not row.value_ok]
    if wrong:
        print(f"{len(wrong)} rows without a ratio: their values differ from the expected ones", file=sys.stderr)
    return 1 if wrong or outcome.failed else 0


def write_rows(file: Path, rows: list[Row], machine: Machine) -> None:
    """Writes rows as JSON atomically: if the process is killed, the file is either the old one or the new one."""
    from benchmarks.harness.rows import records

    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(records(rows, machine.name), indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)


if __name__ == "__main__":
    sys.exit(main())
