"""Printing never ends a command: terminals that lack characters, closed pipes, full disks."""

import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.harness.forks import Forks
from seppo_fast.config.load import to_yaml
from seppo_fast.train import train
from seppo_fast.utils.logging import tolerant_output
from tests.helpers.runs import log_of, tiny_config

ROOT = Path(__file__).parents[2]
ASCII = {"PYTHONIOENCODING": "ascii"}
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # Python then treats file names as ASCII
PROMPTS = ["ein Füchschen", "狐 🦊", "half a \udce9 name"]


class Failing(io.StringIO):
    """A stream on which every write, or every flush, fails."""

    def __init__(self, error, at="write"):
        super().__init__()
        self.error, self.at, self.tried = error, at, 0

    def write(self, text):
        return self._try("write", lambda: super(Failing, self).write(text))

    def flush(self):
        self._try("flush", super().flush)

    def _try(self, name, call):
        if name == self.at:
            self.tried += 1
            raise self.error
        return call()


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (BrokenPipeError(32, "Broken pipe"), ""),
        (OSError(28, "No space left on device"), "can no longer be printed: [Errno 28] No space left on device"),
        (OSError(5, "Input/output error"), "can no longer be printed: [Errno 5] Input/output error"),
        (ValueError("I/O operation on closed file"), "can no longer be printed: I/O operation on closed file"),
    ],
    ids=["closed pipe", "full disk", "terminal gone", "closed file"],
)
def test_a_stream_that_fails_is_given_up(monkeypatch, at, error, told):
    out, err = Failing(error, at), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with tolerant_output():
        for _ in range(3):
            print("a line", flush=True)
            print("and an error", file=sys.stderr)
    assert out.tried and sys.stdout is out and sys.stderr is err
    assert err.getvalue().count("and an error\n") == 3
    assert err.getvalue().count("can no longer be printed") == bool(told) and told in err.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch, encoding):
    stored = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stored, encoding=encoding))
    with tolerant_output(), tolerant_output():
        for prompt in PROMPTS:
            print(prompt, flush=True)
    expected = [prompt.encode(encoding, "backslashreplace") for prompt in PROMPTS]
    assert stored.getvalue().splitlines() == expected


def test_without_any_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw and some services
    with tolerant_output():
        print("nothing")
    assert sys.stdout is None


@pytest.fixture(scope="module")
def ascii_only(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("ascii"), ASCII) as forks:
        yield forks.run


@pytest.fixture(scope="module")
def c_locale(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("locale"), C_LOCALE) as forks:
        yield forks.run


@pytest.fixture
def config(tiny, tmp_path):
    made = tiny_config(tiny, tmp_path, train={"updates": 2}, model={"train": "lora"})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(made))
    return file


def finished(folder):
    """Returns whether a run of two updates is complete."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["update"] for entry in entries] == [1, 2] and (folder / "weights").is_dir()


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "Füchse"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (40, 30), (index * 60, 90, 200)).save(folder / f"ü{index}.png")
        (folder / f"ü{index}.txt").write_text("ein rotes Füchschen 🦊", encoding="utf-8")
    (folder / "schlecht é.png").write_bytes(b"")
    return folder


def test_every_command_on_a_terminal_of_ascii(ascii_only, config, pictures, tmp_path):
    words = [config, "--data.source", pictures, "--output", tmp_path / "Läufe"]
    checked = ascii_only("check", *words)
    assert (checked.code, checked.err) == (3, "")
    assert "bad: schlecht \\xe9.png: no caption" in checked.out and "L\\xe4ufe" in checked.out
    (pictures / "schlecht é.png").unlink()
    for argv in (
        ["train", *words],
        ["report", tmp_path / "Läufe"],
        ["export", tmp_path / "Läufe", "--format", "comfyui"],
        ["export", tmp_path / "Läufe", "--format", "diffusers", "--output", tmp_path / "Größe"],
        ["train", *words, "--train.updates", "2"],
    ):
        done = ascii_only(*argv)
        assert (done.code, done.err) == (0, ""), argv
        assert done.out.isascii()
    assert finished(tmp_path / "Läufe")
    assert (tmp_path / "Größe" / "model_index.json").is_file()
    assert "Füchse" in (tmp_path / "Läufe" / "report.html").read_text(encoding="utf-8")
    refused = ascii_only("train", "ü.yaml")
    assert refused.code == 2 and refused.err.startswith("seppo-fast: config '\\xfc.yaml' does not exist")


def test_a_locale_without_utf_8(c_locale, config, pictures, tmp_path):
    (pictures / "schlecht é.png").unlink()
    words = [config, "--data.source", pictures]
    refused = c_locale("train", *words, "--output", tmp_path / "Läufe")
    assert refused.code == 2 and "PYTHONUTF8=1" in refused.err and "Traceback" not in refused.err
    assert refused.err.startswith("seppo-fast: output = ") and "L\\udcc3\\udca4ufe' is not UTF-8" in refused.err
    assert not (tmp_path / "Läufe").exists()
    for argv in (["train", *words], ["report", tmp_path / "run"], ["export", tmp_path / "run"]):
        done = c_locale(*argv)
        assert (done.code, done.err) == (0, ""), argv
    assert finished(tmp_path / "run")
    card = (tmp_path / "run" / "export-lora" / "README.md").read_text(encoding="utf-8")
    assert "F\\udcc3\\udcbcchse" in card


def test_a_reader_that_leaves_does_not_end_a_run(ascii_only, config, tmp_path):
    done = ascii_only("train", config, lines=1)
    assert (done.code, done.err) == (0, "")
    assert len(done.out.splitlines()) == 1 and finished(tmp_path / "run")
    for argv in (
        ["check", config, "--output", tmp_path / "other"],
        ["train", config, "--help"],
        ["report", tmp_path / "run"],
    ):
        done = ascii_only(*argv, lines=1)
        assert (done.code, done.err) == (0, ""), argv


def test_a_full_disk_behind_stdout_does_not_end_a_run(ascii_only, config, tmp_path):
    done = ascii_only("train", config, out="/dev/full")
    assert done.code == 0 and finished(tmp_path / "run")
    assert done.err == "seppo-fast: output can no longer be printed: [Errno 28] No space left on device\n"


def test_the_interpreter_ends_well_behind_a_pipe_that_closed(config):
    """The interpreter flushes stdout once more at exit, and without care would exit with code 120."""
    command = [sys.executable, "-m", "seppo_fast", "train", str(config), "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert (running.stderr.read(), running.wait()) == (b"", 0)


def test_the_library_prints_as_tolerantly(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(OSError(28, "No space left on device")))
    config = tiny_config(tiny, tmp_path, train={"updates": 1})
    train(config)
    assert len(log_of(config)) == 1


@pytest.mark.parametrize("module", ["seppo_fast", "seppo_fast.cli"])
def test_python_m_is_the_command_line(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "train", "missing.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("seppo-fast: config 'missing.yaml' does not exist")


def test_the_warning_about_an_argument_that_diffusers_passes_is_hidden_and_no_other():
    from huggingface_hub.utils._validators import smoothly_deprecate_legacy_arguments

    from seppo_fast.utils.logging import quiet_libraries

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        smoothly_deprecate_legacy_arguments("hf_hub_download", {"local_dir_use_symlinks": "auto"})
        assert len(seen) == 1  # the library still warns
        quiet_libraries()
        smoothly_deprecate_legacy_arguments("hf_hub_download", {"local_dir_use_symlinks": "auto"})
        assert len(seen) == 1
        smoothly_deprecate_legacy_arguments("hf_hub_download", {"force_filename": "x"})
        assert len(seen) == 2
