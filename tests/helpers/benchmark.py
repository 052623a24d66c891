"""Runs benchmark suites at the smallest sizes, for the tests of benchmarks."""

from __future__ import annotations

import json

import torch

from benchmarks import run
from benchmarks.harness import losses
from benchmarks.harness.measure import Machine
from benchmarks.suites import cache, kernels

MACHINE = Machine(torch.device("cpu"), quick=True)


def smallest_kernels(monkeypatch):
    """Reduces the suite `kernels` to two cases, one in the trainer's memory layout, compiled without a C++ compiler."""
    cases = (losses.Case(1, losses.EMBEDDED), losses.Case(3, losses.EMBEDDED, True, losses.LAYOUTS[1]))
    monkeypatch.setitem(kernels.SIZES, "quick", kernels.Size(cases, rounds=1, seconds=1e-3))
    monkeypatch.setattr(losses, "COMPILER", "aot_eager")


def smallest_cache(monkeypatch):
    """Reduces the suite `cache` to full weights in bf16; each call copies each checkpoint once."""
    models, kept = (("full", "bf16"),), {"iteration": 2, "update": 3}
    monkeypatch.setitem(cache.SIZES, "quick", cache.Size(models, kept, rounds=1, pairs=1, steps=2))


def driven(suite, tmp_path):
    """Runs a suite; returns its exit code and its rows."""
    code = run.main(["--suite", suite, "--quick", "--json", str(tmp_path / "rows.json")])
    return code, json.loads((tmp_path / "rows.json").read_text())
