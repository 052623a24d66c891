"""Each kernel launch from Python to the driver, through Triton's own compiler and launcher on a stub of libcuda.

Shown for each kernel, as our functions launch it: Triton's launcher accepts its arguments, including nested tuples with
constants and None. The driver is called once, for that kernel, with its grid, block, shared memory and stream. The
parameters are those that the PTX declares, in number, size and order, each with the bits of its Python argument.

Not shown: that a GPU loads and runs the machine code, and what torch does there (memory, streams, graphs), which needs
test_*_gpu.py. The machine code is checked in test_*_compile.py, its results in test_*_interpreter.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from itertools import combinations
from pathlib import Path

import pytest

from tests.kernels.launcher_cases import CASES, SWAPPED
from tests.kernels.stub_driver import STREAM, environment

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # as Triton finds it
HEADER = Path(sysconfig.get_paths()["include"], "Python.h")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="Triton's launcher needs a C compiler: gcc or clang"),
    pytest.mark.skipif(not HEADER.exists(), reason="Triton's launcher needs Python.h"),
]

# For each of Triton's argument types: the format in which `struct` packs it, its type in PTX. "*" is any pointer.
FORMATS = {"*": ("<Q", "u64"), "i32": ("<i", "u32"), "i64": ("<q", "u64"), "fp32": ("<f", "f32")}
SCRATCH = {"global scratch": 0, "profile scratch": 0}  # Triton's own last arguments; our kernels need no such memory
CONTRACTED = {
    "_errors_fwd_kernel": False,
    "_errors_bwd_kernel": False,
    "_preference_fwd_kernel": False,
    "_temporal_fwd_kernel": True,
    "_temporal_bwd_kernel": True,
}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of a process on the stub: {"right": launches by case, "swapped": of one case, "warnings": messages}."""
    variables = environment(COMPILER, tmp_path_factory.mktemp("stub"))
    command = [sys.executable, "-m", "tests.kernels.launcher_cases"]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _type(kind):
    return kind[0] if kind.startswith("*") else kind


def _check(launch, programs):
    """Checks that the arguments in Python, the PTX's declarations and what arrived at the driver agree."""
    arrived, options = launch["arrived"], launch["options"]
    assert (arrived["launches"], arrived["kernel"], arrived["stream"]) == (1, launch["kernel"], STREAM)
    assert options["grid"] == [programs]
    assert arrived["grid"] == [programs, 1, 1]
    assert arrived["block"] == [32 * options["num_warps"], 1, 1]
    assert arrived["shared"] == launch["shared"]
    assert arrived["attributes"] == 0  # neither clusters nor a cooperative launch
    formats = [FORMATS[_type(kind)] for _, kind, _ in launch["arguments"]] + [FORMATS["*"]] * len(SCRATCH)
    assert launch["ptx"] == [declared for _, declared in formats]
    values = {name: value for name, _, value in launch["arguments"]} | SCRATCH
    expected = {
        name: struct.pack(packed, value).hex()
        for (name, value), (packed, _) in zip(values.items(), formats, strict=True)
    }
    assert dict(zip(values, arrived["parameters"], strict=True)) == expected


@pytest.mark.parametrize("case", CASES)
def test_each_argument_arrives_where_the_kernel_reads_it(case, records):
    made = records["right"][case]
    assert [launch["kernel"] for launch in made] == list(CASES[case].launches)
    for launch in made:
        _check(launch, CASES[case].launches[launch["kernel"]])


def test_every_kernel_is_launched_and_says_whether_it_contracts(records):
    """Triton 3.10 changes the default, and 3.9 warns about launches that do not set it."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "kernels").glob("*.py")))
    launches = [launch for made in records["right"].values() for launch in made]
    assert {launch["kernel"] for launch in launches} == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
    said = {(launch["kernel"], launch["options"].get("enable_fp_fusion")) for launch in launches}
    assert said == set(CONTRACTED.items())
    assert records["warnings"] == []


def test_two_arguments_swapped_by_the_launcher_are_noticed(records):
    made = records["swapped"]
    assert len(made) == len(CASES[SWAPPED].launches)
    for launch in made:
        with pytest.raises(AssertionError, match="pred_ptr"):
            _check(launch, CASES[SWAPPED].launches[launch["kernel"]])


@pytest.mark.parametrize("kernel", CONTRACTED)
def test_any_two_arguments_swapped_would_be_noticed(kernel, records):
    """Checks that any two arguments of the same type have different values in some launch."""
    together, apart = set(), set()
    for made in records["right"].values():
        for launch in made:
            if launch["kernel"] == kernel:
                for (first, kind, x), (second, other, y) in combinations(launch["arguments"], 2):
                    if _type(kind) == _type(other):
                        together.add((first, second))
                        apart |= {(first, second)} if x != y else set()
    assert together and together == apart
