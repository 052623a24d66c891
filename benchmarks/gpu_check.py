"""The first run on a GPU: does it compute correctly, and how fast is it? Prints one page and writes one file of rows.

    python -m benchmarks.gpu_check                                # on any CUDA machine; nothing is downloaded
    python -m benchmarks.gpu_check --output check --json FILE     # keeps results in ./check; rerun it to continue
    python -m benchmarks.gpu_check --only loss --only temporal    # some steps

Steps run one after another, each in a separate process, so that one that crashes or hangs does not affect the others.
Each step's result is written atomically to the output folder. Rerunning the command runs only the steps whose result is
missing, damaged, wrong, or from another commit, device or version of torch. On a GPU the model at true size is SD-1.5's
architecture with random weights, written into that folder first (4.3 GB). On a CPU every step runs at a small size, on
the pipeline that ships with the package, as a smoke test.

Exit codes: 0 all values are right, 1 a value is wrong, 2 invalid command line, 3 a step could not run or is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seppo_fast.utils.logging import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.checks import headlines, run_checks, value_checks  # noqa: E402
from benchmarks.harness.isolated import Broken, isolated  # noqa: E402
from benchmarks.harness.measure import Machine  # noqa: E402
from benchmarks.harness.models import Workplace, write_pipeline  # noqa: E402
from benchmarks.harness.provenance import commit, device  # noqa: E402
from benchmarks.harness.rows import records  # noqa: E402
from seppo_fast.utils.errors import CheckpointError  # noqa: E402
from seppo_fast.utils.files import staged_folder  # noqa: E402

ROOT = Path(__file__).parents[1]
_CODE = ("seppo_fast", "kernels", "benchmarks")
_HANGS = 4.0  # a step is killed after this many times its estimate, but not before _PATIENCE seconds
_PATIENCE = 240.0
_MOST_MINUTES = 24 * 60
RIGHT, WRONG, FAILED = "right", "WRONG", "could not run"


@dataclass(frozen=True)
class Step:
    """One step of the check.

    Attributes:
        run: runs the step in a workplace and adds its findings.
        seconds: assumed duration on an H200; it has not been measured.
        true_size: whether the step needs the pipeline at true size.
    """

    run: Callable[[Workplace, value_checks.Found], None]
    seconds: float
    true_size: bool = False


STEPS = {
    "machine": Step(headlines.machine, 10),
    "loss": Step(value_checks.loss, 60),
    "temporal": Step(value_checks.temporal, 50),
    "pool": Step(value_checks.pool, 20),
    "equal": Step(run_checks.equal_weights, 100),
    "tiers": Step(run_checks.tiers, 30),
    "true-size": Step(run_checks.true_size, 70, true_size=True),
    "loss-rate": Step(headlines.loss_rate, 50),
    "sampling": Step(headlines.sampling_rate, 40, true_size=True),
    "step": Step(headlines.learning_rate_of_pairs, 70, true_size=True),
    "updates": Step(headlines.whole_updates, 110, true_size=True),
}


@dataclass
class Result:
    """The result of a step, as it is stored.

    Attributes:
        step: the step's name.
        status: `RIGHT`, `WRONG` or `FAILED`.
        lines: lines for the page.
        rows: rows in the format of `benchmarks.run --json`.
        seconds: duration of the step.
        place: device, version of torch, commit and a digest of the code; a result from another place is not reused.
    """

    step: str
    status: str
    lines: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    place: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes the result atomically, with a checksum."""
        body = json.dumps(asdict(self), indent=1)
        file = folder / f"{self.step}.json"
        beside = file.with_name(f".{file.name}")
        beside.write_text(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n", encoding="utf-8")
        os.replace(beside, file)

    @classmethod
    def read(cls, folder: Path, step: str) -> Result | None:
        """Returns the stored result of a step, or None if it is missing or damaged."""
        try:
            checksum, _, body = (folder / f"{step}.json").read_text(encoding="utf-8").partition("\n")
            whole = hashlib.sha256(body.rstrip("\n").encode()).hexdigest() == checksum
            return cls(**json.loads(body)) if whole else None
        except (OSError, ValueError, TypeError):
            return None


def main(words: list[str] | None = None) -> int:
    """Runs the steps, prints the page and writes the rows; returns the exit code."""
    arguments = parsed(words)
    started = time.monotonic()
    try:
        place = isolated(_here, seconds=_PATIENCE)
    except Broken as problem:
        print(f"the device cannot be queried: {problem}", file=sys.stderr)
        return 3
    results: dict[str, Result] = {}
    for name in arguments.only or STEPS:
        kept = Result.read(arguments.output, name)
        if kept is not None and kept.status == RIGHT and kept.place == place:
            print(f"{name}: {kept.status}, from {arguments.output}", flush=True)
            results[name] = kept
            continue
        left = 60 * arguments.minutes - (time.monotonic() - started)
        estimate = STEPS[name].seconds if place["size"] == "gpu" else 0.0  # a CPU may be busy with other work
        if left < max(estimate, 1.0):
            reason = f"not started: it takes about {estimate:.0f} s, but {max(0.0, left):.0f} s are left"
            results[name] = Result(name, FAILED, [reason], place=place)
            continue
        print(f"{name} ...", flush=True)
        hangs = max(_PATIENCE, _HANGS * estimate) if estimate else left
        results[name] = _run(name, arguments.output, place, min(left, hangs))
        print(f"{name}: {results[name].status}, {results[name].seconds:.0f} s", flush=True)
    page = _page(results, place, time.monotonic() - started)
    print(page)
    try:
        (arguments.output / "page.txt").write_text(page, encoding="utf-8")
        if arguments.json:
            _write_rows(arguments.json, results)
    except OSError as problem:
        print(f"the page or the rows could not be written: {problem}", file=sys.stderr)
        return 3
    if {name for name in STEPS if name in results and results[name].status == RIGHT} == set(STEPS):
        shutil.rmtree(arguments.output / "pipeline", ignore_errors=True)
    statuses = {result.status for result in results.values()}
    return 1 if WRONG in statuses else 3 if FAILED in statuses else 0


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; a mistake in it ends the process with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="folder for the steps' results")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    parser.add_argument("--only", metavar="STEP", action="append", choices=STEPS, help=f"one of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="start no step that would end later; default: 10")
    arguments = parser.parse_args(words)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: the folder {arguments.json.absolute().parent} does not exist")
    if arguments.json and arguments.json.exists() and not arguments.json.is_file():
        parser.error(f"--json {arguments.json}: exists and is not a regular file")
    if not 0 < arguments.minutes <= _MOST_MINUTES:
        parser.error(f"--minutes {arguments.minutes}: must be more than 0 and at most {_MOST_MINUTES}")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"--output {arguments.output}: {problem.strerror}")
    return arguments


def _machine() -> Machine:
    torch.backends.cudnn.allow_tf32 = False  # values are checked in float32, and TF32 is less precise
    where = device()
    return Machine(where, quick=where.type == "cpu")


def _here() -> dict[str, str]:
    """Returns what results depend on; runs in a separate process, because it may initialize CUDA."""
    machine, code = _machine(), hashlib.sha256()
    for file in sorted(file for part in _CODE for file in (ROOT / part).rglob("*.py")):
        code.update(file.read_bytes())
    versions = {"torch": torch.__version__, "commit": commit(), "code": code.hexdigest()}
    return {"device": machine.name, "size": machine.size, **versions}


def _run(name: str, folder: Path, place: dict[str, str], seconds: float) -> Result:
    """Runs a step in a separate process; its output goes into a file beside its result."""
    started = time.monotonic()
    log = folder / f"{name}.log"
    try:
        lines, rows, wrong = isolated(_found, name, folder, seconds=seconds, log=log)
        result = Result(name, WRONG if wrong else RIGHT, lines, rows)
    except Broken as problem:
        result = Result(name, FAILED, [str(problem), f"its full output: {log}"])
    result.seconds, result.place = time.monotonic() - started, place
    result.write(folder)
    return result


def _found(name: str, folder: Path) -> tuple[list[str], list[dict[str, Any]], bool]:
    """Runs a step in this process; returns lines, rows, and whether any value is wrong."""
    machine, step = _machine(), STEPS[name]
    for left in folder.glob(f".{name}-*"):
        shutil.rmtree(left, ignore_errors=True)  # left by a process that was killed
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.absolute()))
    place = Workplace("shapes", 32, work, machine)
    try:
        if step.true_size and machine.device.type == "cuda":
            place = Workplace(str(_pipeline(folder)), 512, work, machine)
        found = value_checks.Found()
        step.run(place, found)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found.lines, records(found.rows, machine.name), bool(found.wrong)


def _pipeline(folder: Path) -> Path:
    """Returns the folder of the pipeline at true size, writing it if it does not exist yet."""
    final = folder.absolute() / "pipeline"
    if not final.exists():
        torch.manual_seed(0)
        with staged_folder(final, CheckpointError) as staging:
            write_pipeline(staging, toy=False)
    return final


def _write_rows(file: Path, results: dict[str, Result]) -> None:
    rows = [row for result in results.values() for row in result.rows]
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, file)


def _page(results: dict[str, Result], place: dict[str, str], seconds: float) -> str:
    """Returns the page, a summary for people."""
    lines = ["", f"{place['device']}, torch {place['torch']}, commit {place['commit']}: {seconds:.0f} s"]
    for name, result in results.items():
        checks = [row for row in result.rows if row["suite"] == value_checks.SUITE]
        right = sum(row["value_ok"] for row in checks)
        count = f", {right} of {len(checks)} values right" if checks else ""
        lines.append(f"{name:10}  {result.status}{count}, {result.seconds:.0f} s")
        lines += [f"            {line}" for line in result.lines]
    if any(result.status != RIGHT for result in results.values()):
        lines.append("Rerun the same command to repeat the steps that are not right.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
