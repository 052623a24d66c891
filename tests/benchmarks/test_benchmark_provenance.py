"""Tests which device benchmarks run on, and which device their results name."""

import pytest
import torch

from benchmarks.harness import provenance
from benchmarks.harness.measure import Machine


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the machine has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")


@pytest.mark.parametrize("value", ["true", "1", "YES"])
def test_a_run_that_is_sent_to_the_cpu_names_the_cpu(value, gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert provenance.device() == torch.device("cpu")
    name = f"CPU, {torch.get_num_threads()} threads"
    assert provenance.provenance("benchmarks.census")["device"] == name
    assert Machine(provenance.device(), quick=True).name == name


@pytest.mark.parametrize("value", [None, "false", "0"])
def test_else_it_names_the_gpu(value, gpu, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert provenance.device() == torch.device("cuda")
    assert provenance.provenance("benchmarks.census")["device"] == "NVIDIA H200"


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert provenance.device() == torch.device("cpu")
