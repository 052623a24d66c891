"""The benchmark driver: one suite, every provider in one process, values checked first.

    python -m benchmarks.run --suite sampling            # on the GPU, or at reduced sizes on a CPU
    python -m benchmarks.run --suite endtoend --quick    # on a CPU, in seconds, to see that it runs
    python -m benchmarks.run --suite step --json FILE    # also writes the rows
    python -m benchmarks.run --suite kernels             # the loss alone, up to 8192 pairs on a GPU
    python -m benchmarks.run --suite cache               # switches between past policies, in every tier
    python -m benchmarks.run --suite video               # AnimateDiff on clips

On a GPU the model is SD-1.5's architecture with random weights (859.5 M parameters, bf16, 64 x 64 latents), on a CPU
the pipeline that ships with the package, in float32; for clips both get random motion modules. Where a provider's
values differ from the baseline's (in `kernels`, from float64's) it gets no ratio, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

from seppo_fast.quiet import quiet_libraries

quiet_libraries()

SUITES = ("sampling", "step", "endtoend", "kernels", "cache", "video")


def main(words: list[str] | None = None) -> int:
    """Runs a suite, prints its rows and writes them where asked; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, on a CPU")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(words)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.absolute().parent}")
    if arguments.quick:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # read where the trainer chooses its device

    import torch

    from benchmarks.measure import Machine
    from benchmarks.provenance import device
    from benchmarks.rows import records, table

    torch.backends.cudnn.allow_tf32 = False  # values are checked in float32, and TF32 is not that
    machine = Machine(device(), arguments.quick)
    started = time.perf_counter()
    rows = importlib.import_module(f"benchmarks.{arguments.suite}").rows(machine)
    made = records(rows, machine.name)
    print(table(rows))
    print(f"{arguments.suite} on {machine.name}, {time.perf_counter() - started:.0f} s, commit {made[0]['commit']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in rows if not row.value_ok]
    if wrong:
        print(f"{len(wrong)} rows without a ratio: their values differ from what they should be", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
