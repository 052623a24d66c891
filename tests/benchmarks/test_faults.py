"""Tests that the soak counts what happens, and that it would notice a corrupt resume."""

import json
import random

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import faults
from benchmarks.faults import FULL, POINT, TERM, TIMED, Command, Soak, contents, count, differences, soak
from benchmarks.harness.forks import Ended

BEGINS = "update 1/12  loss 0.7\nupdate 2/12  loss 0.7\n"


@pytest.fixture(scope="module")
def command(forks, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "UPDATES", 6)
        yield Command(forks, tmp_path_factory.mktemp("soak"), "lora")


def test_a_disturbed_run_ends_as_the_straight_one_and_is_counted(command):
    seen = soak([command], 3, random.Random(5))
    assert seen.corrupt == [] and seen.kills >= 3 and not command.output.exists()
    assert len(seen.first) >= 1 and min(seen.lost, default=0) >= 0


def test_one_other_bit_or_another_log_is_seen(command):
    assert command.run().code == 0
    assert differences(command.straight, command.output) == []
    (state,) = sorted((command.output / "state").iterdir())[-1:]
    file = state / "policy.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 2**-20
    save_file(tensors, file)
    log = command.output / "log.jsonl"
    log.write_text(log.read_text().replace('"skipped": 0', '"skipped": 1', 1))
    assert differences(command.straight, command.output) == ["log", f"{file.relative_to(command.output)} {name}"]
    assert {"log", f"{file.relative_to(command.output)} {name}"} <= contents(command.output).keys()


@pytest.mark.parametrize(
    ("kind", "code", "out", "err", "hit"),
    [
        (TIMED, -9, BEGINS, "", 1),
        (TIMED, 0, BEGINS, "", 0),
        (POINT, -9, "", "", 1),
        (TERM, 130, BEGINS, "interrupted after update 2", 1),
        (TERM, 0, BEGINS, "", 0),
        (FULL, 0, BEGINS + "training continues without these pictures: no space left on this disk\n", "", 1),
        (FULL, 6, BEGINS, "error: no space left on this disk", 1),
        (FULL, 0, BEGINS, "", 0),
    ],
)
def test_only_disturbances_that_hit_are_counted(kind, code, out, err, hit):
    seen = Soak()
    count(Ended(code, out, err, 3.0, tuple(range(1, 1 + out.count("\n")))), kind, 0, seen)
    assert seen.disturbed[kind] == hit
    assert seen.first == [1] * (out != "") and seen.resumed == seen.lost == []


def test_what_several_workers_saw_adds_up():
    one, other = Soak(runs=2, corrupt=["a"], lost=[1]), Soak(runs=3, corrupt=["b"], lost=[0], first=[0.5])
    one.disturbed[TIMED], other.disturbed[TIMED] = 4, 5
    both = one + other
    assert (both.kills, both.runs, both.corrupt, both.lost, both.first) == (9, 5, ["a", "b"], [1, 0], [0.5])


def test_lost_updates_and_the_seconds_of_a_resume():
    seen = Soak()
    count(Ended(0, "resuming after update 3 of 12\nupdate 4/12  loss 0.7\n", "", 3.0, (0.5, 0.75)), TIMED, 4, seen)
    count(Ended(0, "no state was saved before the run ended; it begins anew\n", "", 3.0, (0.5,)), TIMED, 2, seen)
    assert seen.lost == [1, 2] and seen.resumed == [0.75] and seen.first == []


@pytest.mark.slow
def test_the_soak_through_its_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(faults, "UPDATES", 4)
    monkeypatch.setattr(faults, "KINDS", {"full": 1e-4})
    assert faults.main(["--kills", "2", "--workers", "2", "--seed", "3", "--json", str(tmp_path / "soak.json")]) == 0
    made = json.loads((tmp_path / "soak.json").read_text())
    assert made["kills"] >= 2 and made["corrupt"] == [] and 0 <= made["save_stall"]["full"] < 1
    assert "kills, " in capsys.readouterr().out


def test_a_corrupt_resume_fails_the_soak(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "UPDATES", 2)
    monkeypatch.setattr(faults, "KINDS", {"lora": 1e-3})
    monkeypatch.setattr(faults, "differences", lambda straight, run: ["log"])
    assert faults.main(["--kills", "1"]) == 1
    with pytest.raises(SystemExit):
        faults.main(["--kills", "0"])
