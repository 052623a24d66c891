"""Settings for all tests, made before anything else is imported; processes that a test starts inherit them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the hub fails at once
os.environ["ACCELERATE_USE_CPU"] = "true"  # the trainer runs on the CPU; tests that need a GPU request it
# torch.compile caches compiled steps on disk and does not notice if an operator's backward changes.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else each fork after its first use prints a warning
# The order of CPU reductions depends on the number of threads, so the number is fixed. It is one, because `make test`
# runs two files at a time, and on two cores two torch processes with two threads each are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from benchmarks.harness.forks import Forks
    from tests.helpers.ranks import Ranks


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny epsilon-prediction pipeline; must not be changed."""
    from tests.helpers.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny motion adapter that fits `tiny`; must not be changed."""
    from tests.helpers.tiny import tiny_adapter

    return tiny_adapter(tmp_path_factory.mktemp("tiny") / "adapter")


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Forks"]:
    """Runs the command line in processes that are forked from one that has already imported everything."""
    from benchmarks.harness.forks import Forks

    with Forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Ranks"]:
    """Like `forks`, but each command runs in several processes at once."""
    from tests.helpers.ranks import Ranks

    with Ranks(tmp_path_factory.mktemp("ranks")) as server:
        yield server


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The file that a pickle of `tests.helpers.hostile` would write; it must not exist after the test."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "a pickle was loaded"
