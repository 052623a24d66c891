"""Compares two runs bit for bit."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from benchmarks.faults import contents, differences
from seppo_fast.runs.checkpoint import saved_states


def content(run):
    """Returns the tensors that a run computed: of its weights and its last state, including its references."""
    run = Path(run)
    found = {}
    for file in sorted([*run.rglob("weights/**/*.safetensors"), *saved_states(run)[0].rglob("*.safetensors")]):
        tensors = load_file(file)
        found |= {f"{file.relative_to(run)} {name}": tensor for name, tensor in tensors.items()}
    return found


def assert_same_run(first, second):
    ours = contents(Path(first.output))
    assert len(ours) > 1 and differences(ours, Path(second.output)) == []
