"""The README agrees with the repository: tables with committed results, named files with files, the diff with tests."""

import inspect
import re
import subprocess
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.harness.counters import count_flops
from benchmarks.tables import fill
from tests.helpers import drop_in

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_results():
    assert fill(README) == README


def test_every_file_of_the_tree_exists_and_none_is_missing():
    tree = README.split("## Files")[1].split("```")[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        if match := re.match(r"(\s*)(\S+)", line):
            path = match[2]
            if not match[1]:
                folder = path if path.endswith("/") else ""
                named.add(path.rstrip("/"))
            else:
                named.add((folder + path).rstrip("/"))
    for path in named - {""}:
        assert (ROOT / path).exists(), path
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    modules = {file for file in listed if not file.startswith("tests/") and not file.endswith("__init__.py")}
    assert modules <= named | {file for file in modules if any(file.startswith(f"{name}/") for name in named & FOLDERS)}


# Folders whose modules the README lists in one line.
FOLDERS = {file.parent.relative_to(ROOT).as_posix() for file in ROOT.glob("[sb]*/*/__init__.py")}


def test_the_shares_of_a_pair_are_the_counted_ones():
    """A guided sampling step costs two forwards, the reference's errors two, the policy two with their backward."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        inputs = torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, 768)
        with torch.no_grad():
            forward = count_flops(lambda: unet(*inputs))
        policy = 2 * count_flops(lambda: unet(*inputs).sample.sum().backward())
    whole = {steps: 2 * steps * forward + 2 * forward + policy for steps in (20, 50)}
    sampling = [f"{2 * steps * forward / whole[steps]:.0%}".rstrip("%") for steps in (20, 50)]
    learning = [f"{policy / whole[steps]:.0%}".rstrip("%") for steps in (50, 20)]
    assert f"{' to '.join(sampling)} % of a pair is the sampling" in README
    assert f"{' to '.join(learning)} % the policy" in README


def test_the_drop_in_diff_is_the_code_that_the_test_runs():
    diff = README.split("```diff")[1].split("```")[0]
    before = [line[1:].strip() for line in diff.splitlines() if line.startswith("-")]
    after = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    source_before = [line.strip() for line in inspect.getsource(drop_in.seppo_before).splitlines()]
    source_after = [line.strip() for line in inspect.getsource(drop_in.seppo_after).splitlines()]
    assert before and after
    assert set(before) <= set(source_before)
    assert set(after) <= set(source_after)
