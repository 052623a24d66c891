"""The suite `kernels` under pytest-benchmark, for its statistics, histories and comparisons.

    python -m pytest benchmarks/test_kernels.py -k "1 pair" --benchmark-group-by=param:case

A measured call is one call of the loss plus waiting for the device; values are checked first. On a CPU the cases are
those of `--quick`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="pip install '.[test]'")

from benchmarks.harness.losses import (
    AUTOGRAD,
    B2,
    B2_COMPILED,
    ONE_PASS,
    OVERWRITING,
    TWIN_COMPILED,
    Case,
    Truth,
    compiles,
    input_sets,
    is_right,
    ways,
)
from benchmarks.harness.measure import Machine
from benchmarks.harness.provenance import device
from benchmarks.suites.kernels import SIZES, missing

MACHINE = Machine(device(), quick=device().type == "cpu")


@pytest.mark.parametrize("case", SIZES[MACHINE.size].cases, ids=str)
@pytest.mark.parametrize("name", [B2, B2_COMPILED, TWIN_COMPILED, AUTOGRAD, ONE_PASS, OVERWRITING])
def test_loss_and_gradient(benchmark: Any, name: str, case: Case) -> None:
    compiled = name in (B2_COMPILED, TWIN_COMPILED)
    if compiled and not compiles(MACHINE):
        pytest.skip("torch.compile does not work here")
    if lack := missing(case, MACHINE):
        pytest.skip(lack)
    sets = input_sets(case, MACHINE)
    way = ways(case, MACHINE, compiled)[name]
    assert is_right(name, case, way, sets[0], Truth(case, sets[0]))
    turns = itertools.cycle(sets)

    def call() -> None:
        way.run(next(turns))
        MACHINE.synchronize()

    benchmark(call)
