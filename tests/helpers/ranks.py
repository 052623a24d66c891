"""Starts several processes over gloo as torchrun would, but forked from one that has already imported everything."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.forks import Server


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: the signal that killed it) and its output."""

    code: int
    out: str


class Ranks(Server):
    """Forks the processes of each run.

    Args:
        folder: folder for the processes' output.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__("tests.helpers.ranks", {"ACCELERATE_USE_CPU": "true"})
        self._folder = folder

    def run(
        self,
        world: int,
        *argv: object,
        fsdp: bool = False,
        faults: Mapping[int, str] | None = None,
        record: Path | None = None,
        broken: bool = False,
        seconds: float = 120,
    ) -> list[Ended]:
        """Runs `seppo-fast ARGV` in each of `world` processes.

        Args:
            world: number of processes; 1 without `fsdp` means no process group.
            argv: arguments of the command line.
            fsdp: whether to set what `accelerate launch --use_fsdp --fsdp_version 2` sets.
            faults: `SEPPO_FAULT` by rank.
            record: folder in which each rank records its inputs and the sizes of what it held, as `RANK.json`.
            broken: whether the last rank's winners of the second update are made non-finite.
            seconds: time after which the processes that are still running are killed.

        Returns:
            How each process ended, by rank.
        """
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp else {}
        alone = world == 1 and not fsdp
        environments = [
            ({} if alone else common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            | {"SEPPO_FAULT": (faults or {}).get(rank, "")}
            for rank in range(world)
        ]
        files = [str(self._folder / f"out-{rank}.txt") for rank in range(world)]
        order = {
            "argv": [str(word) for word in argv], "environments": environments, "files": files,
            "record": record and str(record), "broken": broken, "seconds": seconds,
        }  # fmt: skip
        ends = self.ask(order)
        return [Ended(code, Path(file).read_text()) for file, code in zip(files, ends, strict=True)]


def _serve() -> None:
    import seppo_fast.train.trainer  # noqa: F401 - the slow imports, done once before forking
    from seppo_fast.utils.logging import quiet_libraries

    quiet_libraries()
    for line in sys.stdin:
        order = json.loads(line)
        children = [_forked(order, rank) for rank in range(len(order["files"]))]
        ends: dict[int, int] = {}

        def kill(living: list[int] = children, ends: dict[int, int] = ends) -> None:
            for child in living:
                if child not in ends:
                    os.kill(child, signal.SIGKILL)

        limit = threading.Timer(order["seconds"], kill)
        limit.start()
        while len(ends) < len(children):
            child, status = os.wait()
            ends[child] = os.waitstatus_to_exitcode(status)
        limit.cancel()
        limit.join()
        print(json.dumps([ends[child] for child in children]), flush=True)


def _forked(order: dict, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    output = os.open(order["files"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["environments"][rank])
    code = 70
    try:
        if order["record"]:
            _record(Path(order["record"]), rank)
        if order["broken"] and rank == len(order["files"]) - 1:
            _break()
        from seppo_fast.cli import main

        code = main(order["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _record(folder: Path, rank: int) -> None:
    """Patches the learner to record each update's pairs, and how many numbers of each kind this process holds."""
    import torch

    from seppo_fast.models.trainable import trainable
    from seppo_fast.train.learner import Learner

    step, clip, taken = Learner.step, torch.nn.utils.clip_grad_norm_, []
    held: dict[str, int] = {}

    def count(tensors):
        return sum((t.to_local() if isinstance(t, torch.distributed.tensor.DTensor) else t).numel() for t in tensors)

    def counting(parameters, *arguments):
        held["gradients"] = count([parameter.grad for parameter in parameters])
        return clip(parameters, *arguments)

    def recording(self, pairs, update):
        rows = zip(pairs.sample_ids, pairs.times.tolist(), pairs.noise.flatten(1).tolist(), strict=True)
        stats = step(self, pairs, update)
        own = trainable(self.policy).values()
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        held.update(weights=count(own), moments=count(moments), average=count(self.ema.shadow_params))
        taken.append({"update": update, "rows": list(rows), "held": dict(held)})
        (folder / f"{rank}.json").write_text(json.dumps(taken))
        return stats

    Learner.step = recording
    torch.nn.utils.clip_grad_norm_ = counting


def _break() -> None:
    from seppo_fast.train.learner import Learner

    step = Learner.step

    def breaking(self, pairs, update):
        if update == 1:
            pairs.winners.fill_(float("nan"))
        return step(self, pairs, update)

    Learner.step = breaking


if __name__ == "__main__":
    _serve()
