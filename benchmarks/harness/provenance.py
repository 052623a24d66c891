"""Records how a result was made: command, commit, torch version and device."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env


def device() -> torch.device:
    """Returns the device to run on: a GPU if one exists, unless ACCELERATE_USE_CPU sends the trainer to the CPU."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    return torch.device("cpu" if cpu else "cuda")


def device_name(device: torch.device) -> str:
    """Returns a GPU's name, or the CPU's number of threads."""
    gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"


def provenance(module: str) -> dict[str, str]:
    """Returns the origin of a result; `module` is the module that was started with `python -m`."""
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "commit": commit(),
        "torch": torch.__version__,
        "device": device_name(device()),
    }


@cache
def commit() -> str:
    """Returns the checkout's short commit hash, with a plus if tracked files differ from it; empty without a checkout.

    It is read once per process: later commits do not change the code that is already loaded.
    """
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
