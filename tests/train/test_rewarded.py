"""Runs that learn from rewards, end to end: they learn, resume, use several processes, and say what they left out."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from seppo_fast.cli import main
from seppo_fast.config.load import to_yaml
from seppo_fast.methods.reverse.method import clip_for
from seppo_fast.runs.checkpoint import newest_state
from seppo_fast.runs.signals import Interrupted
from seppo_fast.train import train as run
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError, NonFiniteError
from tests.helpers.rewarded import REWARDED, rewarded_config, rewards_of
from tests.helpers.runs import collected, log_of
from tests.helpers.same_run import assert_same_run

OWN = "tests.helpers.rewarded:"


class Ended(Exception):
    """Ends a run from outside."""


@pytest.mark.parametrize(("objective", "samples", "updates"), [("ddpo", 64, 2), ("nft", 32, 6)])
def test_the_reward_rises(tiny, tmp_path, objective, samples, updates):
    """The brightness of the same 64 samples, from the same noise, before and after a few updates."""
    config = rewarded_config(
        tiny, tmp_path, objective, sampler={"steps": 4 if objective == "ddpo" else 2, "guidance": 1.0, "batch": 32},
        train={"updates": updates, "updates_per_iteration": 1, "pairs_per_update": samples, "micro_batch": 32},
        rl={} if objective == "ddpo" else {"samples_per_prompt": 16},
    )  # fmt: skip
    rewards = []

    def observe(trainer, finished):
        if finished not in (0, updates):
            return
        batches = [[(updates, number, part) for number in range(32)] for part in (1, 2)]
        with torch.no_grad():
            latents = torch.cat([trainer.method._finals(trainer.method._sample(trainer.policy, b)) for b in batches])
        rewards.append(rewards_of(trainer, latents))

    run(config, observe)
    gains = rewards[1] - rewards[0]
    assert gains.mean() > 10 * gains.std() / 8 > 0


def end_after_the_first(trainer, updates):
    if updates == 1:
        trainer.saver.wait()
        raise Ended


def interrupt_the_second_rollout(trainer, updates):
    if updates != 2:
        return
    decode = trainer.family.decode

    def interrupted(latents):
        trainer.interruption.asked = True
        return decode(latents)

    trainer.family.decode = interrupted


@pytest.mark.parametrize("objective", REWARDED)
def test_a_broken_run_resumes_bit_for_bit(tiny, tmp_path, objective):
    """Ended in the middle of the first iteration, then interrupted while the second one's samples are rewarded."""
    rl = {"prompt_count": 2} if objective == "ddpo" else {}
    straight = rewarded_config(tiny, tmp_path, objective, rl=rl, save={"minutes": 0}, sampler={"steps": 2})
    run(straight)
    broken = straight.model_copy(update={"output": str(tmp_path / "broken")})
    with pytest.raises(Ended):
        run(broken, end_after_the_first)
    assert newest_state(Path(broken.output)).update == 1
    with pytest.raises(Interrupted, match="after update 2"):
        run(broken, interrupt_the_second_rollout)
    run(broken)
    assert_same_run(straight, broken)
    queues = [newest_state(Path(config.output)).numbers.get("method") for config in (straight, broken)]
    assert queues[0] == queues[1] and (queues[0] is not None) == (objective == "ddpo")
    log = log_of(straight)
    assert all(entry["grad_norm"] > 0 and entry["skipped"] == 0 and entry["rows"] > 0 for entry in log)
    assert log[0]["reward_mean"] == log[1]["reward_mean"] != log[2]["reward_mean"]


def test_the_log_shows_where_ratios_are_clipped(tiny, tmp_path):
    """By step; in the first update of an iteration none is."""
    config = rewarded_config(tiny, tmp_path, "ddpo", train={"updates": 2, "learning_rate": 1e-4})
    limits = []
    run(config, lambda trainer, updates: limits.append(trainer.method.clip))
    first, second = log_of(config)
    assert limits[0] == clip_for(256)
    steps = [[entry[f"clipped_step{step}"] for step in (1, 2, 3)] for entry in (first, second)]
    assert steps[0] == [0, 0, 0] and first["log_ratio_square"] == 0 < second["log_ratio_square"]
    assert second["clipped"] == pytest.approx(np.mean(steps[1])) and second["rows"] == 18
    assert steps[1][1] == max(steps[1]) > 0  # the second to last step, whose kappa is largest


def world_logs(config, ranks, folder):
    """Returns the logs of one process and of two."""
    (folder / "run.yaml").write_text(to_yaml(config))
    logs = []
    for world in (1, 2):
        output = str(folder / f"world{world}")
        ends = ranks.run(world, "train", folder / "run.yaml", "--output", output)
        assert [end.code for end in ends] == [0] * world, ends[0].out
        logs.append(log_of(config.model_copy(update={"output": output})))
    return logs


def assert_alike(one, two, names, tolerance=1e-3):
    for name in names:
        assert one[name] == pytest.approx(two[name], rel=tolerance, abs=1e-7), name


def test_two_processes_are_rewarded_as_one(tiny, tmp_path, ranks):
    """DDPO's batch statistics over all 7 samples, of which two processes have 4 and 3."""
    train = {"updates": 2, "learning_rate": 1e-5, "pairs_per_update": 7}
    config = rewarded_config(tiny, tmp_path, "ddpo", train=train, rl={"prompt_count": 2, "steps": 0.7})
    one, two = world_logs(config, ranks, tmp_path)
    for update in (0, 1):
        names = ("loss", "grad_norm", "kept", "rows", "unscored", "reward_mean", "reward_std")
        assert_alike(one[update], two[update], names)
    assert one[0]["rows"] == 14 and one[0]["clipped"] == two[0]["clipped"] == 0 and abs(one[0]["loss"]) > 1e-4
    queues = [newest_state(tmp_path / f"world{world}").numbers["method"]["rewards"] for world in (1, 2)]
    assert list(queues[0]) == list(queues[1])
    assert all(queues[0][prompt] == pytest.approx(queues[1][prompt], rel=1e-3) for prompt in queues[0])


def test_a_process_without_rows_takes_part(tiny, tmp_path, ranks):
    """Of two prompts, one for each process, only the first has a winner in the first update."""
    train = {"updates": 2, "learning_rate": 1e-5, "pairs_per_update": 4}
    config = rewarded_config(tiny, tmp_path, "d3po", train=train, rl={"reward": OWN + "small_only"})
    trainer = Trainer(config)
    ids = trainer.method._maker.all_sample_ids(0)
    words = [trainer.cache.prompts[number % len(trainer.cache)].split() for number in ids]
    assert ["small" in those for those in words] == [True, False]
    one, two = world_logs(config, ranks, tmp_path)
    assert [entry["rows"] for entry in one] == [3, 6] and one[0]["kept"] == 0.75
    assert one[0]["loss"] == two[0]["loss"] == pytest.approx(np.log(2), rel=1e-7)
    for update in (0, 1):
        assert_alike(one[update], two[update], ("loss", "grad_norm", "kept", "rows", "zero_spread", "reward_mean"))


def test_a_run_that_learned_nothing_says_so(tiny, tmp_path, capsys):
    config = rewarded_config(tiny, tmp_path, "ddpo", rl={"reward": OWN + "constant"}, train={"updates": 2})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    for updates in (2, 4):  # the second time it resumes
        assert main(["train", str(file), "--train.updates", str(updates)]) == 5
        said = capsys.readouterr()
        assert f"none of the run's {updates} updates changed the weights: objective 'ddpo' found nothing" in said.err
        assert "another rl.reward" in said.err and "non-finite" not in said.err
        assert said.out.count("SKIPPED: nothing to learn from") == 2
    folder = Path(config.output)
    assert not (folder / "weights").exists() and not (folder / "skipped.jsonl").exists()
    log = log_of(config)
    assert [(e["loss"], e["grad_norm"], e["rows"], e["kept"], e["skipped"]) for e in log] == [(None, None, 0, 0, 1)] * 4


def test_updates_without_rows_are_skipped_and_others_learn(tiny, tmp_path, capsys):
    """One prompt an update, some of which have no winner."""
    train = {"updates": 4, "updates_per_iteration": 2, "pairs_per_update": 2}
    config = rewarded_config(tiny, tmp_path, "d3po", train=train, rl={"reward": OWN + "small_only"})
    prompts, weights = [], []

    def observe(trainer, updates):
        (number,) = trainer.method._maker.sample_ids(updates)
        prompts.append(trainer.cache.prompts[number % len(trainer.cache)])
        weights.append(torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()]))

    run(config, observe)
    learned = ["small" in prompt for prompt in prompts[:4]]
    assert True in learned and False in learned
    assert [not torch.equal(before, after) for before, after in pairwise(weights)] == learned
    assert [entry["skipped"] for entry in log_of(config)] == [float(not moved) for moved in learned]
    assert capsys.readouterr().out.count("SKIPPED: nothing to learn from") == learned.count(False)


def test_the_end_of_a_run_tells_non_finite_from_empty_updates(tiny, tmp_path):
    trainer = Trainer(rewarded_config(tiny, tmp_path, "grpo"))
    trainer.finished, trainer.learner.without_rows = 5, 2
    with pytest.raises(NonFiniteError, match="non-finite 3 times, and 2 had nothing to learn from; all 5 were skipped"):
        trainer.save()


def test_another_reward_is_refused_on_resuming(tiny, tmp_path, monkeypatch):
    config = rewarded_config(tiny, tmp_path, "grpo", train={"updates": 2})
    run(config)
    other = config.model_dump(mode="json")
    other["rl"]["reward"] = OWN + "constant"
    file = tmp_path / "other.yaml"
    file.write_text(json.dumps(other))
    assert main(["train", str(file)]) == 2
    digest = property(lambda scorer: "another", lambda scorer, value: None)
    monkeypatch.setattr("seppo_fast.scorers.functions.FunctionScorer.digest", digest, raising=False)
    with pytest.raises(ConfigError, match="the reward changed since the run was started"):
        run(config.model_copy(update={"train": config.train.model_copy(update={"updates": 4})}))


def test_clips_are_rewarded(tiny, adapter, tmp_path):
    """One update on clips of three frames. The linear schedule's last step starts at 0 and is left out."""
    config = rewarded_config(
        tiny, tmp_path, "grpo", model={"train": "lora", "lora_rank": 2, "motion_adapter": str(adapter)},
        data={"source": "shapes-motion:3:3", "frames": 3}, rl={"kl": 0.1, "samples_per_prompt": 2},
        train={"pairs_per_update": 2, "updates": 1, "updates_per_iteration": 1}, sampler={"steps": 3},
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.add_checkpoint()
    batch = collected(trainer, 0)
    assert batch.store.shape == (6, 4, 3, 8, 8) and len(batch) == 4 and trainer.method.clip == clip_for(768)
    assert rewards_of(trainer, batch.store.view(2, 3, 4, 3, 8, 8)[:, -1]).shape == (2,)
    stats = trainer.learner.step(batch, 0)
    assert stats["grad_norm"] > 0 and stats["clipped"] == stats["kl"] == 0 and 0 < stats["reward_mean"] < 1
    moved = [name for name, state in trainer.learner.state()[0]["optimizer"].items() if state.abs().max() > 0]
    assert any("motion" in name for name in moved) and any("motion" not in name for name in moved)
