"""Tests `report --watch`: when the page is rewritten, when it is not, and how the command ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seppo_fast.cli import main
from seppo_fast.commands.watch import SECONDS, watch
from seppo_fast.runs.signals import Interrupted
from seppo_fast.train import train
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import tiny_config

ROOT = Path(__file__).parents[2]
UPDATES = 4


class Enough(Exception):
    """Raised to end a watch early."""


def lines(*numbers):
    return "".join(json.dumps({"update": number, "loss": 0.69, "seconds": 30.0}) + "\n" for number in numbers)


@pytest.fixture
def run(tmp_path):
    """The folder of a run after its first update."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(f"train:\n  updates: {UPDATES}\n  pairs_per_update: 8\n")
    (folder / "log.jsonl").write_text(lines(1))
    return folder


def finish(run, update=UPDATES):
    (run / "weights").mkdir(exist_ok=True)
    (run / "weights" / "seppo_fast.json").write_text(json.dumps({"update": update}))


def shown(file):
    """Returns how many updates a page shows as finished; None if the page is missing or shows no such number."""
    found = re.search(rf"<td>updates</td><td>(\d+) of {UPDATES}</td>", file.read_text() if file.exists() else "")
    return int(found[1]) if found else None


class Watched:
    """Watches a run until it is finished; each time the watch waits, the next of `steps` is called.

    Attributes:
        updates: the number of updates that the page shows before each step and at the end; see `shown`.
        told: the lines for the user.
        file: the page.
    """

    def __init__(self, run, *steps):
        self.updates, self.told = [], []
        self._run, self._steps = run, iter(steps)
        self.file = watch(run, None, self.told.append, self._wait)
        self.updates.append(shown(self.file))

    def _wait(self, seconds):
        assert seconds == SECONDS == 10
        self.updates.append(shown(self._run / "report.html"))
        next(self._steps)()


def appended(run, text):
    def append():
        with open(run / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(text)

    return append


def nothing():
    pass


def test_the_page_follows_the_log_to_the_end_of_the_run(run):
    def replaced():
        (run / "report.html").write_text("<!doctype html>")  # not overwritten until the log grows

    steps = appended(run, lines(2)), replaced, nothing, appended(run, lines(3, 4)), lambda: finish(run)
    watched = Watched(run, *steps)
    assert watched.updates == [1, 2, None, None, 4, 4]
    assert watched.file == run / "report.html"
    assert watched.told == [
        f"report: {watched.file}, rewritten every 10 seconds while the log grows, without further lines; ends with the "
        "run, or press Ctrl-C",
        f"the run is finished; its final report: {watched.file}",
    ]
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "log.jsonl", "report.html", "weights"]


def test_the_last_page_shows_what_came_just_before_the_end(run):
    def end():
        (run / "log.jsonl").write_text(lines(1, 2, 3, 4))
        finish(run)

    assert Watched(run, end).updates == [1, 4]


def test_a_finished_run_is_written_once(run):
    finish(run)
    watched = Watched(run)
    assert watched.updates == [1] and len(watched.told) == 2


def test_a_line_that_is_being_written_is_left_for_the_next_page(run):
    whole = lines(2)
    steps = appended(run, whole[:20]), appended(run, whole[20:]), lambda: finish(run)
    assert Watched(run, *steps).updates == [1, 1, 2, 2]


def test_a_resumed_run_rewrites_its_log(run):
    def resumed():
        (run / "new").write_text(lines(1, 2))
        os.replace(run / "new", run / "log.jsonl")

    steps = appended(run, lines(2, 3)), resumed, appended(run, lines(3, 4)), lambda: finish(run)
    assert Watched(run, *steps).updates == [1, 3, 2, 4, 4]


def test_weights_of_a_shorter_run_do_not_end_it(run):
    finish(run, update=1)
    steps = nothing, appended(run, lines(2, 3, 4)), lambda: finish(run)
    assert Watched(run, *steps).updates == [1, 1, 4, 4]


@pytest.mark.parametrize("begun", ["config.yaml", ".lock"])
def test_a_run_without_a_log_is_waited_for(run, begun):
    settings = (run / "config.yaml").read_text()
    for name in ("config.yaml", "log.jsonl"):
        (run / name).unlink()
    (run / begun).write_text(settings if begun == "config.yaml" else "a run of seppo_fast\n")

    def first():
        (run / "config.yaml").write_text(settings)
        (run / "log.jsonl").write_text(lines(1))

    watched = Watched(run, nothing, first, lambda: finish(run))
    assert watched.updates == [None, None, 1, 1]
    assert watched.told[1] == f"{run / 'log.jsonl'} does not exist yet; waiting for the run's first update"
    assert len(watched.told) == 3 and watched.told[0].startswith("report: ")


def test_a_folder_that_is_no_run_is_refused(tmp_path, run, capsys):
    for name, content in {"empty": {}, "other": {".lock": "of another program\n"}}.items():
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).write_text(text)
    assert main(["report", str(tmp_path / "absent"), "--watch"]) == 2
    assert "absent: does not exist; name the folder of a run" in capsys.readouterr().err
    for name in ("empty", "other"):
        assert main(["report", str(tmp_path / name), "--watch"]) == 2
        said = capsys.readouterr()
        assert said.out == "" and f"{name}: not the folder of a run: log.jsonl cannot be read" in said.err
    assert main(["report", str(run), "--watch", "--output", str(run / "config.yaml")]) == 2
    assert "exists and is not a seppo_fast report" in capsys.readouterr().err


def test_a_folder_that_goes_away_ends_it(run):
    def gone():
        for file in run.iterdir():
            file.unlink()
        run.rmdir()

    with pytest.raises(ConfigError, match="run: does not exist; name the folder of a run"):
        Watched(run, gone)


def test_a_page_is_whole_or_the_one_before(run, monkeypatch):
    """An interrupted write leaves the previous page and no other file."""
    written = Path.write_bytes

    def half(path, content):
        written(path, content[: len(content) // 2])
        raise Interrupted("now")

    def interrupted():
        appended(run, lines(2))()
        monkeypatch.setattr(Path, "write_bytes", half)

    with pytest.raises(Interrupted):
        Watched(run, interrupted)
    assert shown(run / "report.html") == 1 and run.joinpath("report.html").read_text().endswith("</html>\n")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "log.jsonl", "report.html"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_and_are_given_back(run, number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted):
            Watched(run, lambda: os.kill(os.getpid(), number))
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_hangup_that_is_ignored_stays_so(run):
    """The case of `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        watched = Watched(run, lambda: os.kill(os.getpid(), signal.SIGHUP), lambda: finish(run))
        assert watched.updates == [1, 1, 1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_real_run_is_followed_to_its_end(tiny, tmp_path, capsys):
    """Looks at a run before its first update, after each update, and once it is finished."""
    config = tiny_config(tiny, tmp_path)
    run = Path(config.output)
    told, seen = [], []

    def look(trainer, updates):
        def wait(seconds):
            page = run / "report.html"
            seen.append((updates, re.search(r"(\d+) of 3<", page.read_text())[1] if page.exists() else None))
            raise Enough

        with pytest.raises(Enough):
            watch(run, None, told.append, wait)

    train(config, look)
    assert seen == [(0, None), (1, "1"), (2, "2"), (3, "3")]
    assert "waiting for the run's first update" in told[1] and not any("finished" in line for line in told)
    capsys.readouterr()
    assert main(["report", str(run), "--watch"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == f"the run is finished; its final report: {run / 'report.html'}"
    assert "3 of 3" in (run / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_command_ends_with_130_when_it_is_interrupted(run, number):
    command = [sys.executable, "-m", "seppo_fast", "report", str(run), "--watch"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stdout.readline().startswith(f"report: {run / 'report.html'}, rewritten every 10 seconds")
        running.send_signal(number)
        out, err = running.communicate()
    assert (running.returncode, out, err) == (130, "", "seppo-fast: interrupted\n")
    assert shown(run / "report.html") == 1
