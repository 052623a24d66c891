"""Kills, signals, damaged files and full disks through the real command line: rerunning it resumes bit for bit."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

import seppo_fast.runs.saver
from seppo_fast.config.load import to_yaml
from seppo_fast.config.schema import SaveConfig
from seppo_fast.distributed.machine import Node
from seppo_fast.runs.checkpoint import prune, saved_states, state_folder
from seppo_fast.runs.folder import lock_run_folder
from seppo_fast.runs.saver import Saver
from seppo_fast.runs.signals import Interrupted, Interruption, defer_sigint
from seppo_fast.train import train
from seppo_fast.utils.errors import CheckpointError
from tests.helpers.runs import log_of, tiny_config
from tests.helpers.same_run import assert_same_run
from tests.helpers.tiny import tiny_pipeline

UPDATES = 6


@pytest.fixture(scope="module")
def shared(tmp_path_factory, tiny):
    return tmp_path_factory.mktemp("survival")


def config_of(shared, tiny, output, **sections):
    base = {
        "train": {"updates": UPDATES, "updates_per_iteration": 4, "ema_decay": 0.9},
        "model": {"train": "lora"}, "save": {"minutes": 0},
    }  # fmt: skip
    base = {key: value | sections.pop(key, {}) for key, value in base.items()}
    return tiny_config(tiny, shared, output=str(output), **base, **sections)


class Run:
    """A run's configuration, folder and command line."""

    def __init__(self, forks, config, folder):
        self.forks, self.config, self.output = forks, config, Path(config.output)
        self.file = folder / "run.yaml"
        self.file.write_text(to_yaml(config))

    def train(self, *flags, fault=""):
        return self.forks.run("train", self.file, *flags, fault=fault)


@pytest.fixture
def run(forks, shared, tiny, tmp_path):
    return Run(forks, config_of(shared, tiny, tmp_path / "run"), tmp_path)


@pytest.fixture(scope="module")
def straight(forks, shared, tiny):
    """The configuration of an uninterrupted run."""
    run = Run(forks, config_of(shared, tiny, shared / "straight"), shared)
    ended = run.train()
    assert ended.code == 0, ended.err
    return run.config


POINTS = [
    "sampling@1", "sampling@4", "micro-batch@1", "micro-batch@5", "save@1", "save@3", "save-policy@2",
    "save-optimizer@2", "save-average@2", "save-references@3", "save-manifest@1", "save-manifest@4", "save-rename@3",
    "save-done@2", "save-done@6", "prune@2", "weights-write@1", "weights@1",
]  # fmt: skip


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_the_same_command_finishes_the_run(run, straight, point):
    killed = run.train(fault=f"{point}=kill")
    assert killed.code == -signal.SIGKILL, "the point was never passed"
    ended = run.train()
    assert ended.code == 0, ended.err
    assert_same_run(run.config, straight)
    assert not list(run.output.rglob(".tmp-*"))


def test_killed_again_and_again(run, straight):
    """Kills at random points; each run that finishes nevertheless is compared."""
    choose, kills = random.Random(1), 0
    names = sorted({point.partition("@")[0] for point in POINTS})
    while kills < 20:
        ended = run.train(fault=f"{choose.choice(names)}@{choose.randint(1, 3)}=kill")
        assert ended.code in (-signal.SIGKILL, 0), ended.err
        kills += ended.code != 0
        if ended.code == 0:
            assert_same_run(run.config, straight)
            shutil.rmtree(run.output)
    assert run.train().code == 0
    assert_same_run(run.config, straight)


@pytest.mark.parametrize("name", ["term", "hup"])
def test_a_signal_saves_the_last_finished_update(run, straight, name):
    if name == "hup" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup")
    ended = run.train("--save.minutes", 60, fault=f"micro-batch@8={name}")
    assert ended.code == 130
    assert f"SIG{name.upper()}: ending at the next micro-batch" in ended.out
    finished = len(log_of(run.config))
    assert 0 < finished < UPDATES
    assert f"interrupted after update {finished}" in ended.err
    assert [path.name for path in saved_states(run.output)] == [f"update-{finished:06d}"]
    ended = run.train()
    assert ended.code == 0 and f"resuming after update {finished} of {UPDATES}" in ended.out
    assert_same_run(run.config, straight)


def test_a_run_outlives_its_terminal_where_hangups_are_ignored():
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            interruption.check()
            assert not interruption.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGUSR1)
            with pytest.raises(Interrupted):
                interruption.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_during_sampling_and_before_an_update_leaves_nothing(run):
    ended = run.train(fault="sampling@1=term")
    assert ended.code == 130 and "interrupted before the first update" in ended.err
    assert not run.output.exists()


def test_a_full_disk_while_saving_is_outlived_twice(run, straight):
    ended = run.train(fault="save-manifest@2=full")
    assert ended.code == 0, ended.err
    assert "could not be saved" in ended.out and "no space left" in ended.out
    assert_same_run(run.config, straight)


def test_a_full_disk_while_pruning_or_logging_is_outlived(run, straight):
    ended = run.train(fault="prune@1=full")
    assert ended.code == 0 and "an older state could not be removed" in ended.out
    assert_same_run(run.config, straight)


def test_a_save_at_the_end_that_fails_is_an_error(run):
    ended = run.train("--save.minutes", 60, fault="micro-batch@8=term")
    assert ended.code == 130
    ended = run.train("--save.minutes", 60, fault="save-manifest@1=full")
    assert ended.code == 6 and "no space left" in ended.err
    assert (run.output / "weights").is_dir(), "the weights must be written nevertheless"
    assert run.train().code == 0


def test_an_interruption_whose_save_fails_does_not_promise_to_go_on(forks, run):
    run.file.write_text(run.file.read_text().replace("minutes: 0.0", "minutes: 60.0"))
    ended = forks.run("train", run.file, fault="micro-batch@8=term,save-manifest@1=full")
    assert ended.code == 6 and "rerun the same command" not in ended.err and "no space left" in ended.err


def test_a_disk_that_stays_full_ends_the_run_after_three_saves(run):
    ended = run.train(fault="save-manifest@2+=full")
    assert ended.code == 6 and ended.out.count("could not be saved") == 2
    assert "no space left" in ended.err
    assert [path.name for path in saved_states(run.output)] == ["update-000001"]


def half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(forks, shared, tiny):
    """A run with two saved states, after updates 2 and 3; the later one adds a past policy."""
    run = Run(forks, config_of(shared, tiny, shared / "stopped", train={"updates_per_iteration": 2}), shared)
    ended = run.train("--train.updates", 3)
    assert ended.code == 0
    assert [path.name for path in saved_states(run.output)] == ["update-000003", "update-000002"]
    return run


FILES = ["manifest.json", "numbers.json", "policy.safetensors", "optimizer.safetensors", "average.safetensors"]
FILES += ["references/manifest.json", "references/checkpoint-000001.safetensors"]


@pytest.fixture
def damaged(stopped, tmp_path, forks):
    """A copy of the stopped run, which tests may damage."""
    shutil.copytree(stopped.output, tmp_path / "run")
    return Run(forks, stopped.config.model_copy(update={"output": str(tmp_path / "run")}), tmp_path)


@pytest.mark.parametrize("damage", [half, flip, Path.unlink], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_state_before_taken(damaged, stopped, name, damage):
    newest = saved_states(damaged.output)[0]
    file = newest / name
    copy = file.read_bytes()  # past policies are hard links: the older state's file must stay intact
    file.unlink()
    file.write_bytes(copy)
    damage(file)
    ended = damaged.train("--train.updates", 3)
    assert ended.code == 0, ended.err
    assert file.name in ended.out and "looking for an older state" in ended.out
    assert "resuming after update 2 of 3" in ended.out
    assert_same_run(damaged.config, stopped.config)
    assert (newest.parent / "damaged-update-000003").is_dir()


def test_where_all_states_are_damaged_nothing_is_deleted_and_nothing_begun(damaged):
    states = saved_states(damaged.output)
    for folder in states:
        flip(folder / "policy.safetensors")
    before = {file: file.read_bytes() for file in damaged.output.rglob("*") if file.is_file()}
    ended = damaged.train()
    assert ended.code == 6 and "none of its 2 saved states can be used" in ended.err
    assert before == {file: file.read_bytes() for file in before}
    assert saved_states(damaged.output) == states


def rewritten(folder, change):
    """Changes a manifest and recomputes its own checksum."""
    manifest = folder / "manifest.json"
    tree = json.loads(manifest.read_text())
    change(tree)
    tree["sha256"] = hashlib.sha256(json.dumps(tree["files"], sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps(tree))


def test_states_are_ordered_and_pruned_by_number_and_other_folders_stay(tmp_path):
    folders = [state_folder(tmp_path, update) for update in (999, 1000, 999_999, 1_000_000, 1_000_001)]
    strays = [tmp_path / "state" / name for name in ("update-abc", "update-000003.bak", "damaged-update-000004")]
    for folder in [*folders, *strays]:
        folder.mkdir(parents=True)
    assert saved_states(tmp_path) == folders[::-1]
    prune(tmp_path, 2)
    assert saved_states(tmp_path) == folders[:2:-1]
    assert sorted((tmp_path / "state").iterdir()) == sorted([*folders[3:], *strays])


@pytest.mark.parametrize("weights", [True, False])
def test_nothing_is_begun_over_states_under_other_names(damaged, weights):
    for folder in saved_states(damaged.output):
        folder.rename(folder.with_name(f"{folder.name}.bak"))
    if not weights:  # as if stopped before its end
        shutil.rmtree(damaged.output / "weights")
    log = (damaged.output / "log.jsonl").read_bytes()
    (damaged.output / "state" / ".DS_Store").touch()
    ended = damaged.train()
    assert ended.code == 2 and "holds no saved state, but update-000002.bak, update-000003.bak." in ended.err
    assert (damaged.output / "log.jsonl").read_bytes() == log
    (damaged.output / "state" / "update-000003.bak").rename(damaged.output / "state" / "update-000003")
    assert "resuming after update 3" in damaged.train("--train.updates", 4).out


@pytest.mark.parametrize("weights", [True, False])
def test_nothing_is_begun_over_states_that_cannot_be_listed(damaged, tmp_path, weights):
    """A file in place of the folder of states represents a folder without permission, which root could list."""
    states = damaged.output / "state"
    states.rename(tmp_path / "elsewhere")
    if not weights:
        shutil.rmtree(damaged.output / "weights")
    for make, said in ((states.touch, "Not a directory"), (partial(states.symlink_to, "gone"), "No such file")):
        make()
        for command in (damaged.train, partial(damaged.forks.run, "export", damaged.output)):
            ended = command()
            assert ended.code == 6 and f"saved states cannot be listed ({said}" in ended.err
        states.unlink()
    assert [entry["update"] for entry in log_of(damaged.config)] == [1, 2, 3]


def test_what_systems_keep_beside_states_refuses_no_run(run):
    """Such files exist in the root of a disk, or after a Mac has opened the folder."""
    for name in (".DS_Store", "state/lost+found/x", "state/._a", "@eaDir/x"):
        file = run.output / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (run.output / ".lock").write_text("a run of seppo_fast\n")
    ended = run.train("--train.updates", 1)
    assert ended.code == 0, ended.err


def test_an_output_below_a_file_is_refused_by_check_too(run):
    for command in ("check", "train"):
        ended = run.forks.run(command, run.file, "--output", run.file / "x")
        assert ended.code == 2 and "run.yaml is a file; choose another folder" in ended.err


def test_a_folder_that_is_no_run_is_not_exported(run):
    for place, said in ((run.file, "is a file"), (run.output, "does not exist")):
        ended = run.forks.run("export", place)
        assert ended.code == 2 and f"{place}: {said}; name the folder of a run" in ended.err


def test_states_that_cannot_be_listed_while_an_older_one_is_removed_are_warned_of(tmp_path, monkeypatch, capsys):
    def lost(*_):
        raise CheckpointError("state: the saved states cannot be listed")

    saver = Saver(tmp_path, 0, 2)
    monkeypatch.setattr(seppo_fast.runs.saver, "prune", lost)
    assert saver.begins(1)
    saver.save(1, {}, {"update": 1}, None)
    saver.wait(last=True)
    said = capsys.readouterr().out
    assert said == "an older state could not be removed: state: the saved states cannot be listed\n"


def test_a_manifest_of_a_newer_format_or_one_that_leads_elsewhere_is_refused(damaged, tmp_path):
    newest, older = saved_states(damaged.output)
    (tmp_path / "secret").write_bytes(b"mine")

    def escape(tree):
        tree["files"]["../../../secret"] = {"size": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}

    rewritten(newest, escape)
    rewritten(older, lambda tree: tree.update(format=2))
    ended = damaged.train()
    assert ended.code == 6
    assert "resolves to a path outside the folder" in ended.out and "format 2 is newer" in ended.err


def test_a_state_of_a_newer_version_is_neither_passed_over_nor_renamed(damaged):
    states = saved_states(damaged.output)
    rewritten(states[0], lambda tree: tree.update(format=2))
    for flags in ((), ("--train.beta", 5)):
        ended = damaged.train(*flags)
        assert ended.code == 6 and "use the version that wrote it" in ended.err
        assert saved_states(damaged.output) == states


def test_an_extra_file_does_no_harm(damaged, stopped):
    (saved_states(damaged.output)[0] / "notes.txt").write_text("mine")
    assert damaged.train("--train.updates", 3).code == 0
    assert_same_run(damaged.config, stopped.config)


def test_settings_that_cannot_change_are_refused_with_both_values(damaged):
    ended = damaged.train("--train.beta", 500, "--train.learning_rate", "1e-5")
    assert ended.code == 2
    assert "train.beta = 2000.0, not 500.0" in ended.err and "train.learning_rate = 0.001, not 1e-05" in ended.err
    ended = damaged.train(
        "--train.pairs_per_update", 8, "--reference.uses", 2, "--seed", 1, "--train.ema_decay", 0
    )  # fmt: skip
    assert ended.code == 2
    for said in (
        "train.pairs_per_update = 6, not 8", "reference.uses = 1, not 2", "seed = 0, not 1",
        "train.ema_decay = 0.9, not 0.0",
    ):  # fmt: skip
        assert said in ended.err
    ended = damaged.train("--train.updates", 2)
    assert ended.code == 2 and "has finished 3" in ended.err


def test_settings_that_may_change_are_taken(damaged):
    ended = damaged.train("--train.updates", 5, "--train.micro_batch", 2, "--save.keep", 3)
    assert ended.code == 0, ended.err
    assert [entry["update"] for entry in log_of(damaged.config)] == [1, 2, 3, 4, 5]
    assert len(saved_states(damaged.output)) == 3
    assert "micro_batch: 2" in (damaged.output / "config.yaml").read_text()
    assert (damaged.output / "weights-before").is_dir()
    assert json.loads((damaged.output / "weights" / "seppo_fast.json").read_text()) == {"update": 5}


def test_a_finished_run_stays_as_it_is(damaged):
    def files():
        return {file: file.read_bytes() for file in (damaged.output / "weights").rglob("*.safetensors")}

    before = files()
    ended = damaged.train("--train.updates", 3)
    assert ended.code == 0 and "weights:" in ended.out
    assert files() == before and not (damaged.output / "weights-before").exists()


def test_other_data_or_another_model_are_refused(damaged, tmp_path, shared, tiny):
    ended = damaged.train("--data.source", "shapes:11:4")
    assert ended.code == 2 and "the data changed since the run was started" in ended.err
    assert "encoding" not in ended.out  # refused before encoding, which can take hours
    other = tiny_pipeline(tmp_path / "other", seed=1)
    ended = damaged.train("--model.path", other)
    assert ended.code == 2 and "the model" in ended.err
    shutil.copytree(tiny, tmp_path / "moved")
    ended = damaged.train("--model.path", tmp_path / "moved", "--train.updates", 3)
    assert ended.code == 0, ended.err


def test_another_noise_schedule_is_another_model(damaged, tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    ended = damaged.train("--model.path", tmp_path / "other")
    assert ended.code == 2 and "the model changed" in ended.err


def test_no_room_for_the_past_policies_when_a_run_goes_on(damaged):
    ended = damaged.train("--reference.host_gib", "1e-6", "--reference.disk_gib", "1e-6")
    assert ended.code == 2 and "no room for the run's past policies" in ended.err


@pytest.mark.parametrize("name", ["config.yaml", "log.jsonl", "samples"])
def test_somebodys_own_files_are_left_alone(run, name):
    run.output.mkdir()
    if name == "samples":
        (run.output / name).mkdir()
    else:
        (run.output / name).write_text("mine")
    ended = run.train()
    assert ended.code == 2 and "holds no run that can be resumed" in ended.err
    assert [path.name for path in run.output.iterdir()] == [name]


def test_two_runs_do_not_share_a_folder(damaged):
    with (damaged.output / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ended = damaged.train()
    assert ended.code == 2 and "another run is writing to this folder" in ended.err
    assert damaged.train("--train.updates", 3).code == 0


def test_a_run_keeps_its_folder_from_its_first_moment(run):
    """The run reads its own lock file during set-up, when it has no saved state yet; the lock must survive that."""
    others = []

    def observe(trainer, updates):
        if updates == 1:
            others.append(run.train())

    train(run.config.model_copy(update={"save": SaveConfig(minutes=60)}), observe)
    (other,) = others
    assert other.code == 2 and "another run is writing to this folder" in other.err
    assert [entry["update"] for entry in log_of(run.config)] == list(range(1, UPDATES + 1))


def test_a_run_begins_where_one_was_ended_before_it_marked_its_lock(run):
    run.output.mkdir()
    (run.output / ".lock").touch()
    assert run.train("--train.updates", 1).code == 0


def test_a_folder_whose_disk_is_full_is_left_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="no space left"), lock_run_folder(tmp_path / "run", Node()):
        pass
    assert not (tmp_path / "run").exists()


@pytest.fixture
def default_ctrl_c():
    """Installs Python's own handler, in case the tests run as a shell's background job, which ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_is_not_lost_in_the_end_of_an_object():
    """An exception raised in a `__del__`, as can happen during imports, would only be printed."""

    class Ends:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    reached = []
    with pytest.raises(KeyboardInterrupt), defer_sigint():  # noqa: PT012 - where it is raised is the point
        Ends()
        reached.append(True)
    assert reached
    with pytest.raises(KeyboardInterrupt), defer_sigint():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(True)
    assert len(reached) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with defer_sigint():
        os.kill(os.getpid(), signal.SIGINT)  # stays ignored


def test_a_run_that_saved_nothing_begins_again(damaged):
    """A run killed before its first state starts over, and the log of the first attempt is dropped."""
    for name in ("state", "weights"):
        shutil.rmtree(damaged.output / name)
    ended = damaged.train("--train.updates", 2)
    assert ended.code == 0, ended.err
    assert "no state was saved" in ended.out
    assert [entry["update"] for entry in log_of(damaged.config)] == [1, 2]
