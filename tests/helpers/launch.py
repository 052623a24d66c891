"""Starts several processes over gloo with `accelerate launch`."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def launch(
    processes: int, *command: object, folder: Path, seconds: float = 300, fsdp: bool = False
) -> subprocess.CompletedProcess[str]:
    """Runs a script with its arguments; raises subprocess.TimeoutExpired if it takes longer than `seconds`."""
    if fsdp:
        several = ["--use_fsdp", "--fsdp_version", "2"]
    else:
        several = ["--multi_gpu"] if processes > 1 else ["--cpu"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1",
        "--num_processes", processes, "--main_process_port", port, "--mixed_precision", "no",
        # accelerate has no flag for several processes on a CPU without MPI; --multi_gpu makes it use torchrun.
        "--dynamo_backend", "no", *several, *command,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, capture_output=True, text=True, env=environment, timeout=seconds
    )
