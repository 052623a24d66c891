"""Numbers keep their decimal point in a program that sets a locale, as graphical programs do."""

import locale
from pathlib import Path

import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.config.load import read_config, to_yaml
from tests.helpers.runs import log_of, tiny_config
from tests.helpers.same_run import assert_same_run

FLAGS = ("--train.beta", "2.5e2", "--train.weight_decay=1e-3", "--sampler.guidance", "1.5")


def trained(file, output):
    assert main(["train", str(file), *FLAGS, "--output", str(output)]) == 0
    assert main(["report", str(output)]) == 0
    return read_config(output / "config.yaml")


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A configuration's file, and the run made from it in the tests' own locale."""
    folder = tmp_path_factory.mktemp("locales")
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (number * 60, 90, 200)).save(folder / "pictures" / f"IMG {number}.png")
        (folder / "pictures" / f"IMG {number}.txt").write_text("an island")
    config = tiny_config(tiny, folder, data={"source": str(folder / "pictures")}, train={"updates": 2})
    (folder / "run.yaml").write_text(to_yaml(config).replace("learning_rate: 0.001", "learning_rate: 1e-5"))
    return folder / "run.yaml", trained(folder / "run.yaml", folder / "plain")


def lacking(name):
    """Returns a mark that skips if this machine lacks a locale."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        return pytest.mark.skip(reason=f"needs the locale {name}")
    finally:
        locale.setlocale(locale.LC_ALL, before)
    return ()


@pytest.fixture(params=[pytest.param(name, marks=lacking(name)) for name in ("de_DE.UTF-8", "tr_TR.UTF-8")])
def with_commas(request):
    """Inside the test, the C library writes numbers with a comma."""
    before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, request.param)
    yield
    locale.setlocale(locale.LC_ALL, before)


def test_a_run_is_the_same_where_numbers_have_commas(plain, with_commas, tmp_path):
    assert locale.localeconv()["decimal_point"] == ","
    file, config = plain
    ours = trained(file, tmp_path / "run")
    assert (ours.train.learning_rate, ours.train.beta, ours.train.weight_decay) == (1e-5, 250.0, 1e-3)
    assert ours == config.model_copy(update={"output": ours.output})
    assert log_of(ours)[0]["learning_rate"] == 1e-5
    assert_same_run(ours, config)
    page = Path(config.output, "report.html")
    before = page.read_bytes()
    assert main(["report", config.output]) == 0 and page.read_bytes() == before
