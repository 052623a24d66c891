"""Tests of `benchmarks.gpu_check`: small steps on a CPU, resuming, and reports of wrong or missing values."""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.checks import headlines, value_checks
from benchmarks.gpu_check import STEPS, Result, Step
from benchmarks.harness import isolated
from benchmarks.harness.isolated import Broken
from benchmarks.harness.models import Workplace
from benchmarks.harness.rows import KEYS, Row

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_all_steps_run_small_on_a_cpu(tmp_path):
    """Runs through the command line, as on a GPU. It takes most of a minute, since it includes runs of each kind."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--output", tmp_path / "out"]
    done = subprocess.run([*command, "--json", tmp_path / "rows.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "out" / "page.txt").read_text()
    assert done.stdout.endswith(page + "\n") and "WRONG" not in page
    assert [name for name in STEPS if f"\n{name:10}  right, " in page] == list(STEPS)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == set(KEYS) and row["value_ok"] for row in rows)
    assert {row["suite"] for row in rows} == {"gpu_check", "kernels", "sampling", "step", "endtoend"}
    cases = {row["case"] for row in rows}
    for part in ("loss, 3 x 4x9x7, bfloat16", "temporal attention, 5 x 37", "equal weights, lora, bf16: zero",
                 "a run with references in files gives the same weights", "update at 32 px, full: zero"):  # fmt: skip
        assert any(case.startswith(part) for case in cases), part
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(": right, from ") == len(STEPS)


def good(place, found):
    found.value("good", True, "itself")


def bad(place, found):
    found.value("fine", True, "itself")
    found.value("off", False, "float64", "by 3")


def broken(place, found):
    print("before it broke")
    raise RuntimeError("no such kernel\nand more")


def crashing(place, found):
    faulthandler.disable()  # its traceback would interrupt pytest's own output
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(place, found):
    time.sleep(600)


@pytest.fixture
def steps(monkeypatch):
    """Returns a function that replaces the steps by ones that take no time."""

    def take(**chosen):
        monkeypatch.setattr(gpu_check, "STEPS", {name: Step(run, 1.0) for name, run in chosen.items()})

    monkeypatch.setattr(gpu_check, "_PATIENCE", 60.0)
    return take


def check(folder, *words):
    return gpu_check.main(["--output", str(folder), *words])


def test_a_wrong_value_is_named_and_exits_1(steps, tmp_path, capsys):
    steps(first=good, second=bad, third=good)
    assert check(tmp_path, "--json", str(tmp_path / "rows.json")) == 1
    page = capsys.readouterr().out
    assert "second      WRONG, 1 of 2 values right" in page and "off: WRONG, by 3" in page
    assert "third       right, 1 of 1 values right" in page
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["case"], row["value_ok"]) for row in rows] == [
        ("good", True), ("fine", True), ("off", False), ("good", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (broken, "RuntimeError: no such kernel"),
        (crashing, "its process ended with code -11"),
        (hanging, "killed after 2 s"),
    ],
    ids=["error", "crash", "hang"],
)
def test_a_step_that_cannot_run_takes_no_other_with_it_and_exits_3(steps, tmp_path, capsys, monkeypatch, run, says):
    if run is hanging:
        monkeypatch.setattr(gpu_check, "_PATIENCE", 2.0)
        monkeypatch.setattr(gpu_check, "_here", lambda: {"device": "H200", "size": "gpu", "torch": "", "commit": ""})
        monkeypatch.setattr(gpu_check, "_HANGS", 2.0)
    steps(first=run, second=good)
    assert check(tmp_path) == 3
    page = capsys.readouterr().out
    assert "first       could not run" in page and says in page and "second      right" in page
    if run is broken:
        assert "before it broke" in (tmp_path / "first.log").read_text()
    assert not list(tmp_path.glob(".first-*")) or run is not broken


def count(path):
    """Increments a counter in a file, across processes."""
    path.write_text(str(int(path.read_text()) + 1) if path.exists() else "1")


def counted(place, found):
    count(Path(os.environ["COUNTED"]))
    found.value("counted", os.environ.get("RIGHT", "1") == "1", "itself")


@pytest.mark.parametrize(
    "change",
    ["nothing", "truncated", "flipped", "not json", "gone", "wrong before", "another device", "another code"],
)
def test_it_goes_on_with_what_is_missing_damaged_wrong_or_of_elsewhere(steps, tmp_path, monkeypatch, change):
    monkeypatch.setenv("COUNTED", str(tmp_path / "runs"))
    monkeypatch.setenv("RIGHT", "0" if change == "wrong before" else "1")
    steps(first=counted)
    folder = tmp_path / "out"
    assert check(folder) == (1 if change == "wrong before" else 0)
    monkeypatch.setenv("RIGHT", "1")
    file = folder / "first.json"
    content = file.read_bytes()
    if change == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif change == "flipped":
        file.write_bytes(content.replace(b"counted", b"cOunted"))
    elif change == "not json":
        file.write_bytes(b"[" * 100_000)
    elif change == "gone":
        file.unlink()
    elif change.startswith("another"):
        kept = Result.read(folder, "first")
        kept.place[change.removeprefix("another ")] = "other"
        kept.write(folder)
    assert check(folder) == 0
    assert (tmp_path / "runs").read_text() == ("1" if change == "nothing" else "2")


def test_a_kept_result_is_whole_or_absent(tmp_path):
    result = Result("loss", "right", ["a line"], [{"case": "x"}], 1.5, {"device": "a GPU"})
    result.write(tmp_path)
    assert Result.read(tmp_path, "loss") == result
    assert [file.name for file in tmp_path.iterdir()] == ["loss.json"]
    assert Result.read(tmp_path, "temporal") is None


def test_only_some_steps(steps, tmp_path, capsys):
    steps(first=bad, second=good)
    assert check(tmp_path, "--only", "second") == 0
    page = capsys.readouterr().out
    assert "second      right" in page and "first" not in page


def test_what_does_not_fit_into_the_minutes_is_not_begun_and_exits_3(steps, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_here", lambda: {"device": "H200", "size": "gpu", "torch": "", "commit": ""})
    steps(first=good, second=good)
    monkeypatch.setitem(gpu_check.STEPS, "second", Step(good, 3600.0))
    assert check(tmp_path, "--minutes", "5") == 3
    page = capsys.readouterr().out
    assert "first       right" in page and "not started: it takes about 3600 s" in page
    assert not (tmp_path / "second.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--only", "losses"],
        ["--minutes", "0"],
        ["--minutes", "soon"],
        ["--minutes", "inf"],
        ["--json", "nowhere/rows.json"],
        ["--json", "tests"],
    ],
)
def test_a_mistake_in_the_command_line_exits_2(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        check(tmp_path / "out", *words)
    assert end.value.code == 2 and words[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_exits_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(SystemExit) as end:
            check(place)
        assert end.value.code == 2 and f"--output {place}: " in capsys.readouterr().err


def test_rows_that_cannot_be_written_take_no_page_with_them(steps, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    steps(first=good, second=good)
    monkeypatch.setattr(gpu_check, "_write_rows", full)
    assert check(tmp_path, "--json", str(tmp_path / "rows.json")) == 3
    said = capsys.readouterr()
    assert "first       right" in said.out and "No space left on device" in said.err


def test_steps_fit_ten_minutes_by_their_estimates():
    assert sum(step.seconds for step in STEPS.values()) <= 610  # the last step may need a second call


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_answers_however_it_is_started(monkeypatch, method, tmp_path):
    monkeypatch.setattr(isolated, "METHOD", method)
    assert isolated.isolated(pow, 3, 4, seconds=60) == 81
    with pytest.raises(Broken, match="ValueError: pow"):
        isolated.isolated(pow, 3, -1, 0, seconds=60, log=tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()


def found_by(step, tmp_path, **machine):
    found = value_checks.Found()
    step(Workplace("shapes", 32, tmp_path, headlines.Machine(CPU, True)), found)
    return found


def test_a_loss_of_the_wrong_sign_or_gradient_is_found(monkeypatch, tmp_path):
    """The checks can fail: with the flipper reversed, and with a gradient 1 % too large."""
    assert found_by(value_checks.loss, tmp_path).wrong == []
    original = value_checks.loss_and_grad

    def larger(*args, **kwargs):
        result, grad = original(*args, **kwargs)
        return result, grad * 1.01

    monkeypatch.setattr(value_checks, "loss_and_grad", larger)
    assert len(found_by(value_checks.loss, tmp_path).wrong) >= 12
    monkeypatch.undo()
    monkeypatch.setattr(value_checks, "LEARN_SIGN", {"adaptive": 1.0, "indicator": -1.0, "never": 0.0})
    assert found_by(value_checks.loss, tmp_path).wrong


def test_attention_over_other_frames_is_found(monkeypatch, tmp_path):
    original = value_checks.temporal_attention
    monkeypatch.setattr(value_checks, "temporal_attention", lambda q, k, v: original(q, k.roll(1, 1), v))
    assert len(found_by(value_checks.temporal, tmp_path).wrong) == 12


def test_a_pool_that_gives_another_checkpoint_is_found(monkeypatch, tmp_path):
    original = value_checks.ReferencePool.resident

    def other(pool, module, index, *rest):
        return original(pool, module, (index + 1) % len(pool), *rest)

    monkeypatch.setattr(value_checks.ReferencePool, "resident", other)
    wrong = found_by(value_checks.pool, tmp_path).wrong
    assert any("switch 0 to a checkpoint in host memory" in case for case in wrong)


def test_a_row_of_a_check_says_what_it_compared():
    found = value_checks.Found()
    found.value("case", False, "float64", "3 is too much")
    assert found.rows == [Row("gpu_check", "case", "ours", "float64", False)]
    assert found.lines == ["case: WRONG, 3 is too much"] and found.wrong == ["case"]
