"""Trackers get the logged numbers step by step, also across a resume; wandb is a fake that records its calls."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from seppo_fast.cli import main
from seppo_fast.config.load import to_yaml
from seppo_fast.runs.journal import read_journal
from seppo_fast.runs.signals import Interrupted
from seppo_fast.runs.trackers import FOLDERS, Trackers
from seppo_fast.train import train
from tests.helpers.runs import log_of, tiny_config

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard: pip install 'seppo_fast[tensorboard]'"
)


class Run:
    """A fake wandb run: records logged values and, like wandb, ignores steps that are not after the last one."""

    def __init__(self, config, **settings):
        self.config, self.settings, self.steps, self.finished = config, settings, {}, 0

    def log(self, values, step):
        if step > max(self.steps, default=-1):
            self.steps[step] = values

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A fake module `wandb` without network access; it keeps its `runs` by id."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.runs, module.started, module.config = {}, [], {}

    def init(**settings):
        module.started.append(settings)
        known = settings["resume"] == "allow" and settings["id"] in module.runs
        return module.runs[settings["id"]] if known else module.runs.setdefault(settings["id"], Run({}, **settings))

    module.init = init
    module.config = types.SimpleNamespace(update=lambda values, allow_val_change: module.runs.update(settings=values))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def interrupted_and_resumed(config, after):
    """Trains a run that is interrupted one update after its last saved state, then resumes it."""

    def observe(trainer, updates):
        if updates == after:
            trainer.save_state()
        if updates == after + 1:
            trainer.saver.save = lambda *arguments: None  # the state that is saved at the end is lost
            raise Interrupted("killed")

    with pytest.raises(Interrupted):
        train(config, observe)
    assert [entry["update"] for entry in log_of(config)] == list(range(1, after + 2))
    train(config)


@needs_tensorboard
def test_tensorboard_has_the_numbers_of_the_log_once(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tiny, tmp_path, train={"updates": 4}, save={"minutes": 60}, log={"trackers": ["tensorboard"]})
    interrupted_and_resumed(config, after=1)
    log = log_of(config)
    events = EventAccumulator(str(Path(config.output) / "tensorboard"))
    events.Reload()
    for name in ("loss", "winner_error", "aaf_rate", "seconds"):
        kept = [(event.step, event.value) for event in events.Scalars(name)]
        assert kept == [(entry["update"], pytest.approx(entry[name])) for entry in log]
    assert len(log) == 4


def test_wandb_goes_on_with_the_same_run(tiny, tmp_path, wandb):
    config = tiny_config(tiny, tmp_path, train={"updates": 4}, save={"minutes": 60}, log={"trackers": ["wandb"]})
    interrupted_and_resumed(config, after=1)
    first, second = wandb.started
    assert first["id"] == second["id"] and first["project"] == "seppo_fast" and first["name"] == "run"
    assert Path(first["dir"]) == Path(config.output)
    run = wandb.runs[first["id"]]
    assert {step: values["loss"] for step, values in run.steps.items()} == {
        entry["update"]: entry["loss"] for entry in log_of(config)
    }
    assert run.finished == 2
    assert wandb.runs["settings"]["train"]["updates"] == 4


def test_without_being_asked_no_tracker_is_opened(tiny, tmp_path, wandb):
    config = tiny_config(tiny, tmp_path)
    train(config)
    assert not wandb.started
    assert not FOLDERS & {path.name for path in Path(config.output).iterdir()}


def test_a_tracker_that_fails_does_not_end_the_run(tiny, tmp_path, wandb, capsys):
    def log(values, step):
        raise ConnectionError("the network is gone")

    config = tiny_config(tiny, tmp_path, log={"trackers": ["wandb"]})
    real = wandb.init

    def init(**settings):
        run = real(**settings)
        run.log = log
        return run

    wandb.init = init
    train(config)
    out = capsys.readouterr().out
    assert out.count("the run continues without wandb: ConnectionError: the network is gone") == 1
    assert len(read_journal(Path(config.output))) == 3


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_missing_package_is_named_before_anything_is_loaded(tiny, tmp_path, monkeypatch, capsys, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *rest: None if asked == name else find(asked, *rest))
    monkeypatch.setattr("seppo_fast.train.setup.load_family", lambda *_: pytest.fail("the model was loaded"))
    config = tiny_config(tiny, tmp_path, log={"trackers": [name]})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    assert f"{name} is not installed: pip install 'seppo_fast[{name}]'" in capsys.readouterr().err
    assert not Path(config.output).exists()


def test_an_unknown_tracker_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_config(tiny, tmp_path)))
    assert main(["train", str(tmp_path / "run.yaml"), "--log.trackers", "mlflow"]) == 2
    assert "log.trackers.0 = 'mlflow': Input should be 'tensorboard' or 'wandb'" in capsys.readouterr().err


def test_a_new_run_in_the_same_folder_is_a_new_run_of_wandb(tiny, tmp_path, wandb):
    config = tiny_config(tiny, tmp_path, log={"trackers": ["wandb"]})
    Path(config.output).mkdir()
    for finished in (0, 0, 3):
        Trackers(config).start(finished)
    begun, anew, resumed = (settings["id"] for settings in wandb.started)
    assert begun != anew and anew == resumed
