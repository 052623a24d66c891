"""What the package installs: wheel, sdist, light imports, and no conflict with HuggingFace's package `kernels`."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import transformers.utils.import_utils

import seppo_fast

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile")
ROOMS = ("kernels", "seppo_fast", "tests", "benchmarks")


def run_python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter in `cwd`, with `arguments` as its sys.argv[1:]."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, timeout=300)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def python_output(code: str, *arguments: object, cwd: Path) -> list[str]:
    """Runs `code` as `run_python` does and returns the lines it prints; a failure shows its stderr."""
    done = run_python(code, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds a `wheel` or an `sdist` of `source` into `target` through the hook that pip itself calls."""
    target.mkdir()
    code = f"import setuptools.build_meta as backend, sys; backend.build_{kind}(sys.argv[1])"
    python_output(code, target, cwd=source)
    (archive,) = target.iterdir()
    return archive


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def files_under(folder: Path, pattern: str) -> set[str]:
    """Returns the files below `folder` that match `pattern`, as POSIX paths relative to `folder`."""
    found = (path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that the repository ships, so that builds leave nothing in the checkout."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy)
    for name in ROOMS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist") / "dist")


@pytest.fixture(scope="module")
def hub_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stand-in for HuggingFace's `kernels`, of a version that transformers imports if it is installed.

    It has a package and its metadata, as in a real installation: transformers then breaks only if another package of
    that name is found first. With metadata alone, even a folder without `__init__.py` would be imported as the package.
    """
    folder = tmp_path_factory.mktemp("hub_package")
    version = transformers.utils.import_utils.KERNELS_MIN_VERSION  # each transformers accepts only a narrow range
    package, metadata = folder / "kernels", folder / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (package / "__init__.py").write_text(
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return lambda *args, **kwargs: (lambda wrapped: wrapped)\n"
    )
    return folder


IMPORT_CLIP = """
import sys
sys.path[:0] = sys.argv[1:]
from transformers import CLIPTextModel
print(CLIPTextModel.__name__)
"""


def test_kernels_has_no_init() -> None:
    assert (ROOT / "kernels" / "preference.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_transformers_finds_its_own_kernels(hub_package: Path, tmp_path: Path) -> None:
    assert python_output(IMPORT_CLIP, ROOT, hub_package, cwd=tmp_path) == ["CLIPTextModel"]


def test_a_kernels_package_would_break_transformers(hub_package: Path, tmp_path: Path) -> None:
    """Shows that the test above can fail: an `__init__.py` in kernels/ is enough."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "__init__.py").touch()
    done = run_python(IMPORT_CLIP, tmp_path, hub_package, cwd=tmp_path)
    assert done.returncode != 0
    assert "from 'kernels'" in done.stderr


def test_wheel_installs_one_name(wheel: Path) -> None:
    top_level = {name.split("/")[0] for name in files_of(wheel)}
    assert top_level == {"seppo_fast", f"seppo_fast-{seppo_fast.__version__}.dist-info"}


def test_wheel_holds_every_module(wheel: Path) -> None:
    modules = {f"seppo_fast/{name}" for name in files_under(ROOT / "seppo_fast", "*.py")}
    kernels = {f"seppo_fast/kernels/{name}" for name in files_under(ROOT / "kernels", "*.py")}
    assert {"seppo_fast/kernels/preference.py", "seppo_fast/kernels/__init__.py"} <= modules | kernels
    assert {name for name in files_of(wheel) if name.endswith(".py")} == modules | kernels


def test_wheel_holds_pipeline_and_recipes(wheel: Path) -> None:
    pipeline = {f"seppo_fast/shapes/pipeline/{name}" for name in files_under(ROOT / "seppo_fast/shapes/pipeline", "*")}
    assert not any(name.startswith("seppo_fast/shapes/motion_pipeline/vae/") for name in files_of(wheel))  # shared
    recipes = {
        f"seppo_fast/config/recipes/{name}" for name in files_under(ROOT / "seppo_fast/config/recipes", "*.yaml")
    }
    assert "seppo_fast/shapes/pipeline/model_index.json" in pipeline
    assert "seppo_fast/shapes/pipeline/unet/diffusion_pytorch_model.safetensors" in pipeline
    assert "seppo_fast/config/recipes/demo.yaml" in recipes
    page = {f"seppo_fast/evaluation/human/page.{kind}" for kind in ("js", "css")}
    assert pipeline | recipes | page | {"seppo_fast/shapes/made.safetensors"} <= files_of(wheel)


def test_wheel_metadata(wheel: Path) -> None:
    folder = f"seppo_fast-{seppo_fast.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == seppo_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in files_of(wheel)
    assert "seppo-fast = seppo_fast.cli:main" in entry_points.splitlines()


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for room in ROOMS:
        assert files_under(source / room, "*.py") == files_under(ROOT / room, "*.py")
    assert files_of(build("wheel", source, tmp_path / "dist")) == files_of(wheel)


def test_wheel_uses_its_own_kernels(wheel: Path, hub_package: Path, tmp_path: Path) -> None:
    """Installed beside HuggingFace's package in site-packages, neither package imports the other's modules."""
    site = tmp_path / "site"
    shutil.copytree(hub_package, site)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import seppo_fast.kernels, seppo_fast.kernels.eager, kernels
print(seppo_fast.__file__, seppo_fast.kernels.eager.__file__, kernels.__file__, *seppo_fast.kernels.__path__, sep="\\n")
"""
    package = site / "seppo_fast"
    expected = [package / "__init__.py", package / "kernels" / "eager.py", site / "kernels" / "__init__.py"]
    assert python_output(code, site, cwd=tmp_path) == [*map(str, expected), str(package / "kernels")]


def test_version_stands_in_one_place(tree: Path) -> None:
    printed = python_output("import runpy; runpy.run_path('setup.py')", "--version", cwd=tree)
    assert printed[-1] == seppo_fast.__version__
    assert seppo_fast.__version__ not in (ROOT / "setup.py").read_text()


def test_package_import_is_light(tmp_path: Path) -> None:
    code = """
import sys
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import seppo_fast
print(*sorted(set(sys.modules) - before))
"""
    assert python_output(code, ROOT, cwd=tmp_path) == ["seppo_fast"]


def test_loss_works_without_triton_and_model_libraries(tmp_path: Path) -> None:
    """The loss at equal predictions is ln 2 even if neither triton nor any model library can be imported."""
    code = """
import sys
for name in ("triton", "diffusers", "transformers", "accelerate", "peft", "datasets", "pydantic", "tyro"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import torch
from seppo_fast.loss import preference_loss
prediction = torch.arange(12.0).reshape(2, 6)
print(preference_loss(prediction, torch.zeros(2, 6), prediction.clone()).loss.item())
"""
    (loss,) = python_output(code, ROOT, cwd=tmp_path)
    assert float(loss) == pytest.approx(0.6931471805599453, abs=1e-7)
