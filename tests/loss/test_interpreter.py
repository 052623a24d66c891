"""Runs the tests of the Triton kernels under Triton's interpreter, in separate processes.

Triton decides at import whether it interprets, so the same process cannot do both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The parts run at the same time, so they should take about equally long.
PARTS = {
    "kernels": ["tests/kernels"],
    "loss": ["tests/loss/test_loss.py", "tests/loss/test_loss_and_grad.py", "-k", "triton-cpu"],
    "loss in other ways": [
        "tests/loss/test_loss_layouts.py", "tests/loss/test_loss_compiled.py", "tests/benchmarks/test_exactness.py",
        "-k", "triton-cpu",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def interpreted():
    """Starts all parts at once. This file is among the last to run, when cores are free."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = {
        "cwd": ROOT,
        "env": {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    running = {name: subprocess.Popen([*command, *part], **options) for name, part in PARTS.items()}
    yield running
    for process in running.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", PARTS)
def test_under_the_interpreter(interpreted, name):
    output, _ = interpreted[name].communicate()
    assert interpreted[name].returncode == 0, output  # pytest returns 5 if nothing was collected


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
