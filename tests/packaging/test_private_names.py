"""The private names of torch and triton that the code relies on: all are listed here and exist in what is installed.

They were also looked up in the wheels of torch 2.10 and 2.11 and of triton 3.6 (see the commit that added this file).
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("seppo_fast", "kernels", "benchmarks", "tests")
# Triton documents only its language; its compiler, driver and interpreter are private although they lack an underscore.
PRIVATE = re.compile(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*|triton\.(backends|runtime|knobs)(\.\w+)+")

NAMES = [
    "torch._C._cuda_getCurrentRawStream",
    "torch._dynamo.config.accumulated_recompile_limit",
    "torch._dynamo.config.recompile_limit",
    "torch._dynamo.exc.TorchDynamoException",
    "torch._dynamo.reset",
    "torch._dynamo.testing.CompileCounterWithBackend",
    "torch._foreach_lerp_",
    "torch._foreach_mul",
    "torch._inductor.config.emulate_precision_casts",
    "torch._subclasses.fake_tensor.DataDependentOutputException",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward",
    "torch.ops.aten._to_copy.default",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
    "triton.backends.compiler.GPUTarget",
    "triton.backends.nvidia.driver",
    "triton.knobs.runtime.interpret",
    "triton.runtime.driver.driver",
    "triton.runtime.interpreter.InterpreterBuilder",
    "triton.runtime.interpreter.interpreter_builder",
]
# Missing in CPU builds of torch.
OF_CUDA = {"torch._C._cuda_getCurrentRawStream"}


def resolved(name: str) -> object:
    """Returns the object with a dotted name; raises AttributeError or ImportError if it does not exist."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def used(file: Path) -> set[str]:
    """Returns the private names that a file uses, including prefixes of longer ones."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        parts, inner = [], node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name):
            names.add(".".join([inner.id, *reversed(parts)]))
    return {name for name in names if PRIVATE.fullmatch(name)}


def test_the_list_is_what_the_code_uses():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    names = set().union(*map(used, files))
    assert sorted(name for name in names if not any(other.startswith(f"{name}.") for other in names)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_exists(name):
    if name in OF_CUDA and torch.version.cuda is None:
        pytest.skip("this build of torch is for a CPU")
    if name.startswith("triton"):
        pytest.importorskip("triton")
    assert resolved(name) is not None


def test_a_name_that_is_gone_is_noticed():
    with pytest.raises((AttributeError, ImportError)):
        resolved("torch._dynamo.config.cache_size_limits_of_old")
