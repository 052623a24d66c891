"""Settings of methods that learn from rewards that contradict each other, as users type them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from seppo_fast.cli import main
from seppo_fast.config.load import parse_config
from seppo_fast.config.rl import RlConfig
from seppo_fast.config.rl_contradictions import _USED_BY
from seppo_fast.distributed.fsdp import validate_fsdp_config
from seppo_fast.train.preflight import preflight
from seppo_fast.utils.errors import ConfigError
from tests.helpers.rewarded import REWARDED
from tests.helpers.tiny import tiny_pipeline

PLAIN = {"data": {"prompt_dropout": 0.0}, "rl": {"reward": "brightness"}, "sampler": {"steps": 20}}
BETAS = {"d3po": 0.1, "spo": 10.0}


def settings(objective, **sections):
    """Returns settings that are accepted, before `sections` are put in."""
    train = {"pairs_per_update": 48, "updates": 60, "beta": BETAS.get(objective, 2000.0)}
    made = {"objective": objective, "train": train, **PLAIN}
    for name, section in sections.items():
        made[name] = made.get(name, {}) | section
    return made


@pytest.mark.parametrize("objective", REWARDED)
def test_each_objective_is_accepted_with_its_defaults(objective):
    config = parse_config(settings(objective))
    assert config.samples_per_prompt == {"grpo": 8, "nft": 8, "d3po": 2}.get(objective, 1)
    assert config.prompts_per_update == 48 // config.samples_per_prompt


REFUSED = {
    "no reward": ("ddpo", {"rl": {"reward": None}}, "objective 'ddpo' needs rl.reward"),
    "an unknown reward": ("ddpo", {"rl": {"reward": "brightnes"}}, "did you mean 'brightness'"),
    "a reward without its weights": ("ddpo", {"rl": {"reward": "pickscore"}}, "rl.reward: scorer pickscore: missing"),
    "a reward that cannot be imported": ("grpo", {"rl": {"reward": "no_such:thing"}}, "cannot be imported"),
    "one sample in a group": ("grpo", {"rl": {"samples_per_prompt": 1}}, "it needs at least 2; ddpo compares"),
    "one sample for nft": ("nft", {"rl": {"samples_per_prompt": 1}}, "compares samples of one prompt"),
    "three samples for d3po": ("d3po", {"rl": {"samples_per_prompt": 3}}, "objective 'd3po' needs 2; remove the key"),
    "two samples for spo": ("spo", {"rl": {"samples_per_prompt": 2}}, "objective 'spo' needs 1; remove the key"),
    "an incomplete group": ("grpo", {"train": {"pairs_per_update": 20}}, "= 20 must be a multiple of 8"),
    "an incomplete group with uses": ("nft", {"reference": {"uses": 3}, "train": {"pairs_per_update": 32}}, "divide"),
    "uses times samples": ("nft", {"reference": {"uses": 2}, "train": {"pairs_per_update": 8}}, "a multiple of 16"),
    "a statistic that is never used": ("ddpo", {"rl": {"prompt_count": 17}}, "never reached with rl.prompt_buffer"),
    "errors beside the policy": ("nft", {"reference": {"errors": "apart"}}, "remove reference.errors, "),
    "a redraw per update": ("ddpo", {"reference": {"redraw": "update"}}, "samples once per iteration"),
    "half an iteration": ("spo", {"train": {"updates": 40}}, "= 40 must be a multiple of train.updates_per_iteration"),
    "prompt dropout": ("d3po", {"data": {"prompt_dropout": 0.2}}, "set data.prompt_dropout = 0, got 0.2"),
    "another solver": ("ddpo", {"sampler": {"name": "dpmsolver++"}}, "needs sampler.name = ddim"),
    "several uses of a step": ("grpo", {"reference": {"uses": 2}}, "trains on each step of a sample once"),
    "a window beyond the end": ("grpo", {"rl": {"window": [3, 21]}}, r"rl.window = \[3, 21\].*sampler.steps = 20"),
    "a window backwards": ("grpo", {"rl": {"window": [3, 2]}}, r"rl.window = \[3, 2\]"),
    "nothing to compare": ("spo", {"rl": {"plain_steps": 20}}, "leaves none of sampler.steps = 20 to compare at"),
    "another objective's beta": ("d3po", {"train": {"beta": 2000.0}}, "published as 0.1; set train.beta, at most 100"),
    "SPO with that beta": ("spo", {"train": {"beta": 2000.0}}, "published as 10; set train.beta"),
    "no noise": ("ddpo", {"rl": {"eta": 0.0}}, "rl.eta = 0.0: Input should be greater than 0"),
    "no step": ("grpo", {"rl": {"steps": 0.0}}, "rl.steps = 0.0: Input should be greater than 0"),
    "one candidate": ("spo", {"rl": {"candidates": 1}}, "rl.candidates = 1: Input should be greater than or"),
    "another objective": ("seppo", {"rl": {"reward": None, "kl": 0.1}}, "rl.kl: objective 'seppo' learns from no"),
    "a reward for another objective": ("sft", {}, "rl.reward: objective 'sft' learns from no reward"),
    "a safeguard": ("grpo", {"train": {"safeguard": True}}, "set train.safeguard = false"),
    "past policies": ("nft", {"reference": {"keep": 4}}, "does not draw among past policies"),
    "a judge": ("ddpo", {"reference": {"judge": "brightness"}}, "objective 'ddpo' uses no scorer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused_by_check(tiny, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    objective, sections, message = REFUSED[name]
    made = settings(objective, **sections)
    made["model"] = {"path": str(tiny), "train": "full"}
    made["data"] |= {"source": "shapes:11:3", "resolution": 16, "cache": str(tmp_path / "cache")}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(made))
    assert main(["check", str(file), "--output", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_more_processes_than_prompts_are_refused(tiny, tmp_path):
    made = settings("grpo", model={"path": str(tiny), "train": "full"}, train={"pairs_per_update": 24})
    made |= {"output": str(tmp_path / "run")}
    message = r"rl.samples_per_prompt = 8 leave fewer prompts per update \(3\) than there are processes \(4\)"
    with pytest.raises(ConfigError, match=message):
        preflight(parse_config(made), torch.device("cpu"), 4)


@pytest.mark.parametrize("objective", REWARDED)
def test_sharded_policies_are_refused(monkeypatch, objective):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=f"objective = {objective} is not supported with FSDP"):
        validate_fsdp_config(parse_config(settings(objective, model={"train": "full"})), 2)


_OTHER = {
    "spread": "group", "prompt_buffer": 20, "prompt_count": 9, "eta": 0.5, "steps": 0.5, "window": [1, 2], "clip": 0.1,
    "kl": 0.1, "mix": 0.5, "candidates": 3, "plain_steps": 1, "gap": 0.1,
}  # fmt: skip


def test_settings_of_other_objectives_are_refused():
    """Every key of the section either serves all five objectives or is refused where it would do nothing."""
    assert set(_OTHER) == set(_USED_BY)
    assert set(RlConfig.model_fields) - set(_USED_BY) == {"reward", "reward_weights", "samples_per_prompt"}
    for key, value in _OTHER.items():
        for objective in REWARDED:
            made = settings(objective, rl={key: value})
            if objective in _USED_BY[key]:
                parse_config(made)
            else:
                with pytest.raises(ConfigError, match=f"rl.{key} is a setting of .*, not of '{objective}': remove it"):
                    parse_config(made)


@pytest.fixture(scope="module")
def clipping(tmp_path_factory):
    """A pipeline whose scheduler clips the predicted x_0. diffusers' pipeline itself sets `clip_sample` to false."""
    folder = tiny_pipeline(tmp_path_factory.mktemp("clipping") / "pipeline")
    change(folder, thresholding=True)
    return folder


def change(folder, **values):
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_scheduler_that_clips_is_refused_before_anything_is_encoded(clipping, tmp_path, capsys):
    sections = {"model": {"path": str(clipping), "train": "full"}, "sampler": {"steps": 3}}
    data = {"source": "shapes:11:3", "resolution": 16, "cache": str(tmp_path / "cache")}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings("ddpo", data=data, **sections)))
    for command in ("check", "train"):
        assert main([command, str(file), "--output", str(tmp_path / "run")]) == 2
        assert "clips the predicted x_0 (thresholding)" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("objective", "rl", "steps"), [("grpo", {"window": [3, 3]}, 3), ("spo", {"plain_steps": 3}, 4), ("ddpo", {}, 1)]
)
def test_a_scheduler_that_leaves_no_step_to_train_is_refused(tiny, tmp_path, capsys, objective, rl, steps):
    """With this spacing the last step starts at timestep 0."""
    folder = Path(shutil.copytree(tiny, tmp_path / "pipeline"))
    change(folder, timestep_spacing="linspace")
    made = settings(objective, rl=rl, sampler={"steps": steps}, model={"path": str(folder), "train": "full"})
    made["data"] |= {"source": "shapes:11:3", "resolution": 16, "cache": str(tmp_path / "cache")}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(made))
    assert main(["check", str(file), "--output", str(tmp_path / "run")]) == 2
    assert f"sampler.steps = {steps} leaves no step to train" in capsys.readouterr().err
