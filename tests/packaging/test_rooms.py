"""The subpackages ("rooms"): which may import which, and how many modules one may have."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each room may import from those before it and from itself.
ROOMS = (
    *("utils", "shapes", "kernels", "loss", "config", "diffusion", "scorers", "data", "models", "distributed"),
    *("references", "runs", "methods", "evaluation", "capacity", "train", "commands", "cli"),
)
FLAT = {"__init__", "__main__", "cli", "loss", "_loss_arguments"}
MOST = 10  # the most modules of a package, without `__init__`; subpackages are counted separately
LAZY = {"seppo_fast"}  # imports its public names on first access


def modules() -> dict[str, Path]:
    """Returns all modules and packages by dotted name; those in kernels/ have the names they are imported under."""
    files = {file: file.relative_to(ROOT) for file in (ROOT / "seppo_fast").rglob("*.py")}
    files |= {file: Path("seppo_fast") / file.relative_to(ROOT) for file in (ROOT / "kernels").glob("*.py")}
    named = {".".join(place.with_suffix("").parts).removesuffix(".__init__"): file for file, place in files.items()}
    assert len(named) > 100
    return named


def imports(name: str, file: Path, known: set[str]) -> set[str]:
    """Returns the package's modules that a module imports, also inside functions, but not under TYPE_CHECKING."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    unused = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name if file.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            outer = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (outer, node.module) if part)
            found |= {inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names}
    return found & known


def room(name: str) -> str:
    parts = name.split(".")
    return {"_loss_arguments": "loss", "__main__": "cli"}.get(parts[-1], parts[1] if len(parts) > 1 else "cli")


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    found = modules()
    return {name: imports(name, file, set(found)) for name, file in found.items() if name not in LAZY}


def test_imports_point_from_a_room_to_those_before_it(arrows):
    assert {room(name) for name in arrows} <= set(ROOMS)
    order = {name: place for place, name in enumerate(ROOMS)}
    upwards = [f"{a} -> {b}" for a, others in arrows.items() for b in others if order[room(b)] > order[room(a)]]
    assert [line for line in upwards if not line.endswith("-> seppo_fast")] == []


def test_no_module_imports_itself_by_way_of_others(arrows):
    left = {name: others - {name, *LAZY} for name, others in arrows.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


def test_rooms_are_small():
    packages = Counter(
        name if file.stem == "__init__" else name.rpartition(".")[0]
        for name, file in modules().items()
        if file.stem != "__init__"
    )
    del packages["seppo_fast"]
    assert {name: count for name, count in packages.items() if count > MOST} == {}
    flat = {file.stem for file in (ROOT / "seppo_fast").glob("*.py")}
    assert flat == FLAT


def test_the_direction_is_noticed(tmp_path):
    file = tmp_path / "random.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nfrom ..train.loop import train\nimport seppo_fast.loss as loss\n"
        "if TYPE_CHECKING:\n    from seppo_fast.cli import main\n"
    )
    known = {"seppo_fast.train.loop", "seppo_fast.loss", "seppo_fast.cli", "seppo_fast.utils.random"}
    assert imports("seppo_fast.utils.random", file, known) == {"seppo_fast.train.loop", "seppo_fast.loss"}
    assert ROOMS.index(room("seppo_fast.train.loop")) > ROOMS.index(room("seppo_fast.utils.random"))


def test_no_test_file_imports_another():
    files = list((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    found = [
        f"{file.name}: {name}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert found == []


def test_a_network_and_an_objective_are_known_in_one_place():
    """Outside models/ nothing refers to UNets, pipeline parts or blocks; one place looks an objective up by name."""
    words = ("UNet", ".pipe.", "tokenizer", "cross_attention_dim", "Transformer2DModel", "ResnetBlock2D", "peft")
    files = [file for file in (ROOT / "seppo_fast").rglob("*.py") if "models" not in file.parts]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    named = {
        f"{file.relative_to(ROOT)}: {word}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        for word in words
        if isinstance(node, ast.Name | ast.Attribute | ast.alias | ast.ImportFrom) and word in ast.unparse(node)
    }
    assert named == set()
    look_ups = [
        file.name
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "OBJECTIVES"
        and isinstance(node.ctx, ast.Load)
    ]
    assert look_ups == ["schema.py"]


def test_what_makes_the_pairs_needs_few_parts():
    from seppo_fast.methods.rollout import Rollout

    assert len(inspect.signature(Rollout).parameters) <= 6
