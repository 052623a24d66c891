"""The journal: log, progress line, warnings and samples of skipped updates; `test_watch` tests the health rules."""

import json
import math
from pathlib import Path

import pytest
import torch

from seppo_fast.config.load import to_yaml
from seppo_fast.runs.journal import Journal, read_journal
from seppo_fast.runs.watch import WINDOW
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import NonFiniteError
from tests.helpers.runs import log_of, tiny_config

CPU = torch.device("cpu")


def entries(differences, reference=0.13):
    return [
        {"update": number, "winner_error": reference + difference, "ref_winner_error": reference}
        for number, difference in enumerate(differences, 1)
    ]


def stats_of(entry, **more):
    rest = {
        "loss": 0.69,
        "aaf_rate": 0.5,
        "grad_norm": 1.0,
        "skipped": 0.0,
        "rollout_seconds": 1.0,
        "learn_seconds": 1.0,
    }
    return {name: value for name, value in entry.items() if name != "update"} | rest | more


def told(journal, folder, some):
    for entry in some:
        journal.append(entry["update"], journal.format(entry["update"], stats_of(entry)))
    return read_journal(folder)


def test_the_line_of_an_objective_with_a_reward(tmp_path, capsys):
    rewards = {"reward_mean": 21.3449, "reward_std": 0.912, "kept": 0.9375}
    stats = stats_of({}, **rewards)
    del stats["aaf_rate"]
    journal = Journal(tmp_path, 40, 64, CPU, "samples")
    journal.format(1, stats)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "update 1/40  loss 0.6900  reward 21.34 (sd 0.91)  kept 0.94  |grad| 1.00  32 samples/s  eta"
    )
    del stats["reward_mean"], stats["reward_std"]  # no sample has a reward
    journal.format(2, stats | {"kept": 0.0})
    assert "loss 0.6900  kept 0.00  |grad| 1.00" in capsys.readouterr().out


def test_a_warning_is_printed_once_and_stands_in_the_log_also_over_a_resume(tmp_path, capsys):
    some = entries([0.01] * 20)  # 8 %
    log = told(Journal(tmp_path, 20, 8, CPU), tmp_path, some[:15])
    out = capsys.readouterr().out
    assert out.count("the winner's error is above the reference's by more than 3%") == 1
    assert "lower train.learning_rate, or raise train.warmup_updates" in out and "nan" not in out
    assert [entry["update"] for entry in log if entry["winner_above_reference"]] == list(range(WINDOW, 16))
    again = Journal(tmp_path, 20, 8, CPU)
    again.resume(12)
    log = told(again, tmp_path, some[12:])
    assert "above the reference's" not in capsys.readouterr().out
    assert [entry["update"] for entry in log] == list(range(1, 21))
    assert [entry["update"] for entry in log if entry["winner_above_reference"]] == list(range(WINDOW, 21))


def test_a_resume_knows_the_first_gradient_of_the_run(tmp_path, capsys):
    def update(journal, number, norm):
        journal.append(number, journal.format(number, stats_of({}, grad_norm=norm)))

    journal = Journal(tmp_path, 20, 8, CPU)
    for number in range(1, 5):
        update(journal, number, 1.0)
    again = Journal(tmp_path, 20, 8, CPU)
    again.resume(4)
    for number in range(5, 11):
        update(again, number, 9.0)
    assert capsys.readouterr().out.count("|grad| is more than 8 times that of the first update") == 1
    assert [entry["update"] for entry in read_journal(tmp_path) if entry["gradient_grown"]] == [9, 10]
    assert "winner_above_reference" not in read_journal(tmp_path)[-1]  # nothing to compare with


def test_one_slow_update_does_not_move_the_time_left(tmp_path, capsys):
    journal = Journal(tmp_path, 110, 8, CPU)
    for number, seconds in enumerate([600.0, 60, 61, 59, 60, 60, 600, 60, 60, 60], 1):
        journal.format(number, stats_of(entries([0])[0], rollout_seconds=seconds - 10, learn_seconds=10.0))
    assert "eta 1.7 h" in capsys.readouterr().out.splitlines()[-1]  # 100 updates of a minute


def test_a_broken_last_line_and_what_is_no_entry_end_the_log(tmp_path):
    good = json.dumps({"update": 1, "loss": None})
    for broken in ("[1]", '{"loss": 1}', '{"update": "x"}', '{"update": 2, "lo', "null"):
        (tmp_path / "log.jsonl").write_text(f"{good}\n{broken}\n")
        assert read_journal(tmp_path) == [{"update": 1, "loss": None}]


def poison(trainer, updates):
    """Makes the winners non-finite from the second update on."""
    maker, real = trainer.method.rollout.maker, trainer.method.rollout.maker.pairs

    def pairs(update, *arguments):
        made = real(update, *arguments)
        if update >= 1:
            made.winners.fill_(math.nan)
        return made

    if updates == 0:
        maker.pairs = pairs


def test_samples_of_skipped_updates_are_written_down(tiny, tmp_path, capsys):
    config = tiny_config(tiny, tmp_path, train={"updates": 6}, save={"minutes": 60})
    expected = [Trainer(config).method.rollout.maker.sample_ids(update) for update in (1, 2, 3)]
    with pytest.raises(NonFiniteError, match="skipped.jsonl"):
        train(config, poison)
    lines = [json.loads(line) for line in (Path(config.output) / "skipped.jsonl").read_text().splitlines()]
    # The third skipped update in a row ends the run, and is recorded too.
    assert [line["update"] for line in lines] == [2, 3, 4]
    assert [line["sample_ids"] for line in lines] == expected
    assert not any(line["scaler_searching"] for line in lines)
    assert capsys.readouterr().out.count("SKIPPED: not finite, samples in skipped.jsonl") == 2


def test_a_scaler_that_searches_is_no_fault_of_the_pairs(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, model={"precision": "fp16"})

    def large(trainer, updates):
        if updates == 0:
            trainer.learner.scaler.load_state_dict(trainer.learner.scaler.state_dict() | {"scale": 2.0**60})

    # No update is applied; the message says that the scaler was still searching.
    with pytest.raises(NonFiniteError, match=r"run's 3 updates .* more train\.updates \(fp16 was still searching"):
        train(config, large)
    lines = [json.loads(line) for line in (Path(config.output) / "skipped.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [entry["update"] for entry in log_of(config) if entry["skipped"]]
    assert len(lines) == 3 and all(line["scaler_searching"] for line in lines)


def test_a_skipped_first_update_is_kept_and_a_resume_forgets_what_comes_again(tiny, tmp_path):
    trainer = Trainer(tiny_config(tiny, tmp_path))
    for update in (0, 1, 2):
        trainer.recorder.skipped(update + 1, [update], searching=False)
    file = tmp_path / "run" / "skipped.jsonl"
    assert len(file.read_text().splitlines()) == 3
    Journal(tmp_path / "run", 3, 6, CPU).resume(2)
    assert [json.loads(line)["sample_ids"] for line in file.read_text().splitlines()] == [[0], [1]]


def test_what_saving_costs_is_in_the_log(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, save={"minutes": 0})
    stalled = {}
    train(config, lambda trainer, updates: stalled.update({updates: trainer.saver.stalled}))
    log = log_of(config)
    assert log[0]["save_stall_seconds"] == 0  # the first state is saved after the first log line
    assert all(entry["save_stall_seconds"] > 0 for entry in log[1:])
    assert sum(entry["save_stall_seconds"] for entry in log) <= stalled[3]


def test_two_processes_write_down_the_samples_of_both(ranks, tiny, tmp_path):
    """One process has non-finite winners in an update."""
    config = tiny_config(tiny, tmp_path, save={"minutes": 60})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    ends = ranks.run(2, "train", tmp_path / "run.yaml", broken=True)
    assert [end.code for end in ends] == [0, 0], ends[0].out
    (line,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    alone = Trainer(config.model_copy(update={"output": str(tmp_path / "other")})).method.rollout.maker.sample_ids(1)
    assert json.loads(line)["update"] == 2
    assert sorted(json.loads(line)["sample_ids"]) == sorted(alone)
