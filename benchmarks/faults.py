"""A soak test: training is killed and resumed again and again: `python -m benchmarks.faults --json FILE`.

A small run (the embedded pipeline, full weights or a LoRA, a state saved after every update) is started through the
command line in forked processes. At random it is killed at some time or at a named point, ended by a signal, or its
disk is full for a moment; then it is restarted, until it finishes. Every byte of its weights, last state, references
and log (except times) is compared with an undisturbed run. A resume counts as corrupt if any of these differ, if a
command ends with an error, or if a kill left a damaged state.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.forks import Ended, Forks
from seppo_fast.utils.errors import EXIT_INTERRUPTED, CheckpointError

UPDATES = 24
POINTS = (
    "sampling", "micro-batch", "save", "save-policy", "save-optimizer", "save-average", "save-references",
    "save-manifest", "save-rename", "save-done", "prune", "weights-write", "weights",
)  # fmt: skip
KINDS = {"lora": 1e-3, "full": 1e-4}  # what is trained: its learning rate
TIMED, POINT, TERM, FULL = "SIGKILL at a time", "SIGKILL at a point", "SIGTERM", "full disk"
WEIGHTS = {TIMED: 6, POINT: 4, TERM: 1, FULL: 0.5}
_SPAN = 1.5  # a timed kill hits within this many seconds, often before the first update
TIMES = ("seconds", "memory_gib", "pairs_per_second")  # endings of log keys whose values differ between equal runs
_GOES_ON = re.compile(r"resuming after update (\d+)")


@dataclass
class Soak:
    """The counts of a soak.

    Attributes:
        disturbed: number of disturbed commands by kind; a full disk counts even if the run survives it.
        runs: number of finished runs.
        corrupt: one line per corrupt resume.
        lost: for each command that resumed or started over, the number of finished updates that it had to repeat.
        first, resumed: seconds from a command's start to its first update, for new and for resumed runs.
    """

    disturbed: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    corrupt: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)

    def __add__(self, other: Soak) -> Soak:
        return Soak(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @property
    def kills(self) -> int:
        """Number of SIGKILLs that hit."""
        return self.disturbed[TIMED] + self.disturbed[POINT]


class Command:
    """The command that trains one configuration, and the results of its undisturbed run.

    Args:
        forks: where the command is run.
        folder: folder for all files.
        train: "lora" or "full".

    Attributes:
        straight: the undisturbed run's `contents`.
        stall: the share of its training time in which it waited for saving.
    """

    def __init__(self, forks: Forks, folder: Path, train: str) -> None:
        self.forks, self.train = forks, train
        self.output = folder / f"{train}-run"
        self._file = folder / f"{train}.yaml"
        tree = {
            "output": str(self.output),
            "model": {"path": "shapes", "train": train, "precision": "fp32"},
            "data": {"source": "shapes:16:3", "resolution": 32, "cache": str(folder / "cache")},
            "train": {
                "updates": UPDATES, "updates_per_iteration": 2, "pairs_per_update": 4, "micro_batch": 2,
                "learning_rate": KINDS[train], "ema_decay": 0.9,
            },
            "reference": {"keep": 2},
            "sampler": {"steps": 2, "guidance": 2.0, "batch": 4},
            "save": {"minutes": 0},
            "log": {"sample_every": 0},
        }  # fmt: skip
        self._file.write_text(json.dumps(tree))  # JSON is valid YAML
        ended = self.run()
        if ended.code:
            raise RuntimeError(f"the undisturbed run failed: {ended.err}")
        self.straight = contents(self.output)
        entries = logged(self.output)
        stalled, took = (sum(entry[name] for entry in entries) for name in ("save_stall_seconds", "seconds"))
        self.stall = stalled / took
        shutil.rmtree(self.output)

    def run(self, **how: Any) -> Ended:
        """Runs the command, with a disturbance given as arguments of `Forks.run`."""
        return self.forks.run("train", self._file, **how)


def contents(run: Path) -> dict[str, Any]:
    """Returns all that a run computed: every tensor's bytes in weights, last state and references, and the log."""
    import torch
    from safetensors.torch import load_file

    from seppo_fast.runs.checkpoint import saved_states

    states = saved_states(run)[:1]
    found: dict[str, Any] = {}
    for file in sorted(file for folder in (run / "weights", *states) for file in folder.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{file.relative_to(run)} {name}"] = (str(tensor.dtype), tensor.shape, content)
    found["log"] = [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in logged(run)]
    return found


def logged(run: Path) -> list[dict[str, float]]:
    """Returns the log of a run; empty if it has none yet."""
    from seppo_fast.runs.journal import read_journal

    return read_journal(run) if (run / "log.jsonl").exists() else []


def worker(folder: Path, number: int, kills: int, seed: int) -> tuple[Soak, list[Command]]:
    """Runs one of several parallel soaks, in its own folder and with its own random disturbances."""
    place = folder / str(number)
    place.mkdir()
    with Forks(place) as forks:
        commands = [Command(forks, place, train) for train in KINDS]
        return soak(commands, kills, random.Random(f"{seed} {number}"), partial(print, f"worker {number}:")), commands


def soak(commands: list[Command], kills: int, choose: random.Random, report: Callable[[str], object] = print) -> Soak:
    """Disturbs runs of the commands in turn until `kills` SIGKILLs have hit and the last run is finished."""
    seen = Soak()
    while seen.kills < kills:
        command = commands[seen.runs % len(commands)]
        finish(command, seen, choose)
        seen.runs += 1
        report(
            f"run {seen.runs} ({command.train}): {seen.kills} kills, {seen.disturbed[TERM]} signals, "
            f"{seen.disturbed[FULL]} full disks, {len(seen.corrupt)} corrupt"
        )
    return seen


def finish(command: Command, seen: Soak, choose: random.Random) -> None:
    """Brings one run from its beginning to its end, with a disturbance at each start; some come too late to hit."""
    code = -1
    while code:
        before = len(logged(command.output))
        kind = choose.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        ended = command.run(**disturbance(kind, choose))
        code = ended.code
        count(ended, kind, before, seen)
        seen.corrupt += [line for line in ended.out.splitlines() if "looking for an older state" in line]
        # Exit code 6 is allowed here: the full disk kept the last state from being written.
        full = kind == FULL and code == CheckpointError.exit_code and "no space left" in ended.err
        if code not in (0, EXIT_INTERRUPTED, -signal.SIGKILL) and not full:
            seen.corrupt.append(f"{command.train}, {kind}: ended with {code}: {ended.err.strip()[-500:]}")
            command.output.rename(command.output.with_name(f"corrupt-{len(seen.corrupt)}"))
            return
    if problems := differences(command.straight, command.output):
        seen.corrupt += [f"{command.train}: {name} differs" for name in problems]
        command.output.rename(command.output.with_name(f"corrupt-{len(seen.corrupt)}"))
    else:
        shutil.rmtree(command.output)


def disturbance(kind: str, choose: random.Random) -> dict[str, Any]:
    """Draws a disturbance of a kind; returns the arguments of `Forks.run` for it."""
    if kind == TIMED:
        return {"seconds": choose.uniform(0, _SPAN)}
    if kind == TERM:
        return {"fault": f"{choose.choice(['sampling', 'micro-batch'])}@{choose.randint(1, 8)}=term"}
    name = choose.choice([name for name in POINTS if kind == POINT or name.startswith(("save", "prune"))])
    passed = 1 if name.startswith("weights") else choose.randint(1, 2)
    return {"fault": f"{name}@{passed}={'kill' if kind == POINT else 'full'}"}


def count(ended: Ended, kind: str, before: int, seen: Soak) -> None:
    """Adds one command's outcome to the counts.

    Args:
        ended: the command's outcome.
        kind: kind of the disturbance.
        before: number of updates that had been logged when the command was started.
        seen: the counts.
    """
    full = kind == FULL and "no space left" in (ended.out + ended.err).lower()
    code = {TIMED: -signal.SIGKILL, POINT: -signal.SIGKILL, TERM: EXIT_INTERRUPTED}
    seen.disturbed[kind] += full if kind == FULL else ended.code == code[kind]
    lines = ended.out.splitlines()
    first = next((when for when, line in zip(ended.times, lines, strict=True) if line.startswith("update ")), None)
    goes_on = _GOES_ON.search(ended.out)
    if goes_on or "it begins anew" in ended.out:
        seen.lost.append(before - int(goes_on[1] if goes_on else 0))
    if first is not None:
        (seen.resumed if goes_on else seen.first).append(first)


def differences(straight: dict[str, Any], run: Path) -> list[str]:
    """Returns the names of everything that differs between a run and the undisturbed one."""
    found = contents(run)
    return sorted(name for name in {*straight, *found} if straight.get(name) != found.get(name))


def result(seen: Soak, commands: list[Command], began: float) -> dict[str, Any]:
    """Returns the numbers that are committed and shown in docs/reliability.md."""
    from benchmarks.harness.provenance import provenance

    return {
        **provenance("benchmarks.faults"),
        "kills": seen.kills,
        "disturbed": dict(seen.disturbed),
        "runs": seen.runs,
        "updates": UPDATES,
        "corrupt": seen.corrupt,
        "lost_mean": statistics.mean(seen.lost or [0]),
        "lost_most": max(seen.lost, default=0),
        "seconds_to_first_update": statistics.median(seen.first) if seen.first else None,
        "seconds_to_resumed_update": statistics.median(seen.resumed) if seen.resumed else None,
        "save_stall": {command.train: command.stall for command in commands},
        "cores": os.cpu_count(),
        "seconds": time.monotonic() - began,
    }


def main(words: list[str] | None = None) -> int:
    """Runs the soak, prints its numbers and writes them to the requested file; returns 1 if a resume was corrupt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="SIGKILLs that must hit; default: 1000")
    parser.add_argument("--workers", type=int, default=1, help="parallel soaks, which share the kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the disturbances")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args(words)
    if arguments.kills < 1 or arguments.workers < 1:
        parser.error(f"--kills and --workers must be at least 1, got {arguments.kills} and {arguments.workers}")
    began = time.monotonic()
    # Kept if a run ends with an error, for inspection.
    folder = Path(tempfile.mkdtemp(prefix="seppo-soak-"))
    share = -(-arguments.kills // arguments.workers)
    with ThreadPoolExecutor(arguments.workers) as pool:
        ends = list(pool.map(lambda number: worker(folder, number, share, arguments.seed), range(arguments.workers)))
    seen = sum((each for each, _ in ends), Soak())
    commands = ends[0][1]
    if seen.corrupt:
        print(f"the files of corrupt runs are in {folder}")
    else:
        shutil.rmtree(folder)
    made = result(seen, commands, began)
    print(json.dumps(made, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 1 if seen.corrupt else 0


if __name__ == "__main__":
    sys.exit(main())
