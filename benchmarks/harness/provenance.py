"""What stands beside every number: commit, torch, device, command."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env


def device() -> torch.device:
    """Returns where benchmarks run: a GPU where one exists, unless ACCELERATE_USE_CPU sends the trainer to the CPU."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or the number of threads of the CPU."""
    gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"


def provenance(module: str) -> dict[str, str]:
    """Returns how a result came about; `module` is the one that was started with `python -m`."""
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "commit": commit(),
        "torch": torch.__version__,
        "device": device_name(device()),
    }


@cache
def commit() -> str:
    """Returns the checkout's short hash, with a plus where tracked files have changed since; empty without a checkout.

    It is read once, since the code that runs is the code that was loaded.
    """
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
