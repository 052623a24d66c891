"""A soak: training is killed again and again, and the same command goes on: `python -m benchmarks.faults --json FILE`.

A small run (the embedded pipeline, full weights or a LoRA, a state after every update) goes through the command line in
forked processes. It is killed at a time or a named point drawn at random, told to end by a signal, or its disk is full
for a moment, and begun again, until it ends by itself. Then every byte of its weights, its last state, its references
and its log (but for times) is compared with those of the run that nobody disturbed. A resume is corrupt where one of
them differs, where a command ends with an error, or where a state that a kill left is found damaged.
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
KINDS = {"lora": 1e-3, "full": 1e-4}  # what is trained, with its learning rate
TIMED, POINT, TERM, FULL = "SIGKILL at a time", "SIGKILL at a point", "SIGTERM", "full disk"
WEIGHTS = {TIMED: 6, POINT: 4, TERM: 1, FULL: 0.5}
_SPAN = 1.5  # seconds within which a command is killed, often before its first update
TIMES = ("seconds", "memory_gib", "pairs_per_second")  # of the log, which no two runs share
_GOES_ON = re.compile(r"going on after update (\d+)")


@dataclass
class Soak:
    """What was seen.

    Attributes:
        disturbed: commands that were killed or told to end, by how; a full disk counts though the run outlives it.
        runs: brought to their end.
        corrupt: what a corrupt resume looked like, a line each.
        lost: updates that were finished and made again, one number a command that goes on.
        first, resumed: seconds from the command to its first update, of a run that begins and of one that goes on.
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
        """SIGKILLs that hit."""
        return self.disturbed[TIMED] + self.disturbed[POINT]


class Command:
    """One configuration of a run, its file, and what the undisturbed run left.

    Args:
        forks: run it.
        folder: for everything.
        train: "lora" or "full".
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
        self._file.write_text(json.dumps(tree))  # YAML takes JSON
        ended = self.run()
        if ended.code:
            raise RuntimeError(f"the undisturbed run failed: {ended.err}")
        self.straight = contents(self.output)
        entries = logged(self.output)
        stalled, took = (sum(entry[name] for entry in entries) for name in ("save_stall_seconds", "seconds"))
        self.stall = stalled / took
        shutil.rmtree(self.output)

    def run(self, **how: Any) -> Ended:
        """The command, disturbed as `Forks.run` takes it."""
        return self.forks.run("train", self._file, **how)


def contents(run: Path) -> dict[str, Any]:
    """All that a run computed: the bytes of the tensors of its weights, last state and references, and its log."""
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
    """The log of a run, as far as it got."""
    from seppo_fast.runs.journal import read_journal

    return read_journal(run) if (run / "log.jsonl").exists() else []


def worker(folder: Path, number: int, kills: int, seed: int) -> tuple[Soak, list[Command]]:
    """A soak in a folder of its own, with a stream of disturbances of its own."""
    place = folder / str(number)
    place.mkdir()
    with Forks(place) as forks:
        commands = [Command(forks, place, train) for train in KINDS]
        return soak(commands, kills, random.Random(f"{seed} {number}"), partial(print, f"worker {number}:")), commands


def soak(commands: list[Command], kills: int, choose: random.Random, report: Callable[[str], object] = print) -> Soak:
    """Disturbs the runs in turn until `kills` SIGKILLs have hit, and brings the last one to its end."""
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
    """One run from its beginning to its end, disturbed at each start but where the fault comes too late."""
    code = -1
    while code:
        before = len(logged(command.output))
        kind = choose.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        ended = command.run(**disturbance(kind, choose))
        code = ended.code
        count(ended, kind, before, seen)
        seen.corrupt += [line for line in ended.out.splitlines() if "looking for an older state" in line]
        # The last state could not be written.
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
    """Arguments of `Forks.run` for one that is drawn at random."""
    if kind == TIMED:
        return {"seconds": choose.uniform(0, _SPAN)}
    if kind == TERM:
        return {"fault": f"{choose.choice(['sampling', 'micro-batch'])}@{choose.randint(1, 8)}=term"}
    name = choose.choice([name for name in POINTS if kind == POINT or name.startswith(("save", "prune"))])
    passed = 1 if name.startswith("weights") else choose.randint(1, 2)
    return {"fault": f"{name}@{passed}={'kill' if kind == POINT else 'full'}"}


def count(ended: Ended, kind: str, before: int, seen: Soak) -> None:
    """Adds what one command shows; `before`: updates that had been logged when it was started."""
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
    """Names of what is not the same in a run as in the undisturbed one."""
    found = contents(run)
    return sorted(name for name in {*straight, *found} if straight.get(name) != found.get(name))


def result(seen: Soak, commands: list[Command], began: float) -> dict[str, Any]:
    """The numbers that the README quotes."""
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
    """Runs the soak, prints its numbers and writes them where asked; 1 where a resume was corrupt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="SIGKILLs that must hit; 1000 without it")
    parser.add_argument("--workers", type=int, default=1, help="soaks at the same time, which share the kills")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args(words)
    if arguments.kills < 1 or arguments.workers < 1:
        parser.error(f"--kills and --workers must be at least 1, got {arguments.kills} and {arguments.workers}")
    began = time.monotonic()
    # Not removed where a run ends with an error: it is what there is to look at.
    folder = Path(tempfile.mkdtemp(prefix="seppo-soak-"))
    share = -(-arguments.kills // arguments.workers)
    with ThreadPoolExecutor(arguments.workers) as pool:
        ends = list(pool.map(lambda number: worker(folder, number, share, arguments.seed), range(arguments.workers)))
    seen = sum((each for each, _ in ends), Soak())
    commands = ends[0][1]
    if seen.corrupt:
        print(f"what is left of corrupt runs is in {folder}")
    else:
        shutil.rmtree(folder)
    made = result(seen, commands, began)
    print(json.dumps(made, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 1 if seen.corrupt else 0


if __name__ == "__main__":
    sys.exit(main())
