"""FSDP2 over gloo: shards train like copies and like one process; and what is refused with FSDP.

Tolerances are those of `test_four_processes`.
"""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from seppo_fast.capacity.presets import _room
from seppo_fast.config.load import to_yaml
from seppo_fast.distributed.fsdp import sharding_plugin, validate_fsdp_config
from seppo_fast.runs.checkpoint import saved_states
from seppo_fast.runs.journal import read_journal
from seppo_fast.utils.errors import ConfigError
from tests.helpers.launch import launch
from tests.helpers.processes import assert_same_training, in_folder, recorded, start  # noqa: F401 - a fixture
from tests.helpers.runs import log_of, tiny_config
from tests.helpers.same_run import assert_same_run
from tests.helpers.tiny import tiny_unet

# Name: (number of processes, sharded).
RUNS = {"one": (1, False), "copies": (2, False), "shards": (2, True), "alone": (1, True)}


@pytest.fixture(scope="module")
def folder(ranks, tiny, tmp_path_factory):
    """The same run by one process, by two as copies, sharded over two, and sharded over one."""
    folder = tmp_path_factory.mktemp("sharding")
    config = settings(tiny, folder)
    (folder / "run.yaml").write_text(to_yaml(config))
    for name, (world, fsdp) in RUNS.items():
        (folder / f"record-{name}").mkdir()
        ends = ranks.run(
            world, "train", folder / "run.yaml", "--output", folder / name, fsdp=fsdp, record=folder / f"record-{name}"
        )
        assert [end.code for end in ends] == [0] * world, ends[0].out
    return folder


def settings(tiny, folder):
    return tiny_config(
        tiny, folder, save={"minutes": 0, "keep": 9}, log={"sample_every": 2},
        train={"beta": 100.0, "pairs_per_update": 8, "micro_batch": 2, "ema_decay": 0.5},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["copies", "shards", "alone"])
def test_shards_and_copies_train_as_one_process(tiny, folder, start, name):  # noqa: F811
    config = settings(tiny, folder)
    assert recorded(folder / f"record-{name}", RUNS[name][0]) == recorded(folder / "record-one", 1)
    assert_same_training(in_folder(config, folder / name), in_folder(config, folder / "one"), start)
    assert log_of(in_folder(config, folder / name))[0]["aaf_rate"] == 1  # equal weights tie exactly
    assert (folder / name / "samples" / "update-000002.png").is_file()


def test_each_process_holds_its_share_of_all_that_is_trained(folder):
    (one,) = ([update["held"] for update in json.loads((folder / "record-one" / "0.json").read_text())][-1:],)
    for rank in (0, 1):
        held = json.loads((folder / "record-shards" / f"{rank}.json").read_text())[-1]["held"]
        assert set(held) == {"weights", "gradients", "moments", "average"}
        for name, count in held.items():
            assert count == pytest.approx(one[0][name] / 2, rel=0.02), name


def test_weights_of_shards_are_whole_and_load(folder):
    state = saved_states(folder / "shards")[0]
    average = load_file(state / "average.safetensors")
    unet = StableDiffusionPipeline.from_pretrained(folder / "shards" / "weights", safety_checker=None).unet
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert unet.state_dict().keys() == average.keys()
    assert all(torch.equal(average[name], tensor) for name, tensor in unet.state_dict().items())


def test_a_run_goes_on_with_shards_with_copies_and_alone(ranks, tiny, folder, start, tmp_path):  # noqa: F811
    """With `spin`, each reference here is the current policy, so both errors must be equal, sharded or not."""
    flags = ("--objective", "spin", "--train.updates_per_iteration", 1, "--log.sample_every", 0)
    command = ("train", folder / "run.yaml", *flags, "--output")
    for updates, (world, fsdp) in enumerate([(2, True), (1, False), (2, True), (2, False)], start=1):
        ends = ranks.run(world, *command, tmp_path / "run", "--train.updates", updates, fsdp=fsdp)
        assert [end.code for end in ends] == [0] * world, ends[0].out
    (alone,) = ranks.run(1, *command, tmp_path / "one", "--train.updates", 4)
    assert alone.code == 0, alone.out
    config = settings(tiny, folder)
    assert_same_training(in_folder(config, tmp_path / "run"), in_folder(config, tmp_path / "one"), start)
    for entry in read_journal(tmp_path / "run"):
        assert entry["winner_error"] == entry["ref_winner_error"] and entry["loser_error"] == entry["ref_loser_error"]


def test_a_dead_process_of_a_sharded_run_ends_all_and_it_goes_on_bit_for_bit(ranks, tiny, folder, tmp_path):
    command = ("train", folder / "run.yaml", "--output", tmp_path / "run")
    ends = ranks.run(2, *command, fsdp=True, faults={1: "micro-batch@5=kill"}, seconds=60)
    assert [end.code for end in ends] == [7, -9], ends[0].out
    assert "another process of this run has exited" in ends[0].out
    ends = ranks.run(2, *command, fsdp=True)
    assert [end.code for end in ends] == [0, 0], ends[0].out
    assert "resuming after update " in ends[0].out
    config = settings(tiny, folder)
    assert_same_run(in_folder(config, tmp_path / "run"), in_folder(config, folder / "shards"))


def test_a_signal_to_one_process_ends_all_with_a_state(ranks, folder, tmp_path):
    command = (
        "train",
        folder / "run.yaml",
        "--output",
        tmp_path / "run",
        "--save.minutes",
        60,
        "--log.sample_every",
        0,
    )
    ends = ranks.run(2, *command, fsdp=True, faults={1: "micro-batch@1=term"})
    assert [end.code for end in ends] == [130, 130], ends[0].out
    assert [state.name for state in saved_states(tmp_path / "run")] == ["update-000001"]


def test_what_one_process_finds_not_finite_all_skip(ranks, folder, tmp_path):
    command = ("train", folder / "run.yaml", "--output", tmp_path / "run", "--train.updates", 3)
    ends = ranks.run(2, *command, "--log.sample_every", 0, fsdp=True, broken=True)
    assert [end.code for end in ends] == [0, 0], ends[0].out
    assert [entry["skipped"] for entry in read_journal(tmp_path / "run")] == [0, 1, 0]
    states = [load_file(state / "policy.safetensors") for state in reversed(saved_states(tmp_path / "run"))]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert all(tensor.isfinite().all() for tensor in states[1].values())


def test_the_launcher_asks_for_it(tiny, folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom seppo_fast.cli import main\nsys.exit(main(sys.argv[1:]))\n")
    command = (script, "train", folder / "run.yaml", "--output", tmp_path / "run", "--train.updates", 1)
    done = launch(2, *command, "--log.sample_every", 0, folder=tmp_path, fsdp=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (ours,), theirs = read_journal(tmp_path / "run"), read_journal(folder / "shards")[0]
    assert {name: ours[name] for name in ("loss", "grad_norm", "winner_error")} == {
        name: theirs[name] for name in ("loss", "grad_norm", "winner_error")
    }


def test_a_lora_is_refused_by_the_command_line(ranks, folder, tmp_path):
    ends = ranks.run(1, "train", folder / "run.yaml", "--output", tmp_path / "run", "--model.train", "lora", fsdp=True)
    assert ends[0].code == 2
    assert "model.train = lora is not supported with FSDP" in ends[0].out and "leave out --use_fsdp" in ends[0].out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"reference": {"errors": "apart"}}, "reference.errors = apart"),
        ({"reference": {"park": True}}, "reference.park = true"),
        ({"model": {"compile": True}}, "model.compile = true"),
        ({"train": {"optimizer": "adamw8bit"}}, "train.optimizer = adamw8bit"),
        ({"train": {"pairs_per_update": 6}, "reference": {"uses": 3}}, r"train.pairs_per_update = 6 .* 4 x 3"),
        (
            {"objective": "diffusion-rpo", "rpo": {"block": 2}},
            r"train.pairs_per_update = 6 must be a multiple of processes x rpo.block = 4 x 2",
        ),
    ],
    ids=["apart", "park", "compile", "8 bit", "uneven", "uneven blocks"],
)
def test_what_shards_do_not_go_with_is_refused(tiny, tmp_path, monkeypatch, sections, said):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=said):
        validate_fsdp_config(tiny_config(tiny, tmp_path, **sections), 4)


def test_a_batch_is_fitted_beside_a_share_of_the_optimizer(tiny, tmp_path, monkeypatch):
    config = tiny_config(tiny, tmp_path, train={"ema_decay": 0.9})
    unet, four = tiny_unet(), SimpleNamespace(world=4, device=torch.device("cpu"))
    weights = sum(weight.numel() * 4 for weight in unet.parameters())
    room = _room(config, unet, four)
    assert (room.moments, room.average) == (2 * weights, weights)  # Adam has two
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    room = _room(config, unet, four)
    assert (room.moments, room.average) == (2 * weights // 4, weights // 4)


def test_what_is_left_open_is_off(tiny, tmp_path, monkeypatch):
    config = tiny_config(tiny, tmp_path, memory="low", train={"pairs_per_update": 8})
    with pytest.raises(ConfigError, match="accelerate launch"):
        validate_fsdp_config(config, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    config = validate_fsdp_config(config, 4)
    assert config.reference.park is False and config.model.compile is False


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"FSDP_VERSION": "1"}, "--fsdp_version 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.gradient_checkpointing"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "--fsdp_reshard_after_forward"),
    ],
)
def test_flags_of_the_launcher_that_are_not_followed_are_refused(monkeypatch, variables, said):
    assert sharding_plugin() is None
    given = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"} | variables
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        sharding_plugin()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "False"  # else only the first process has a text encoder
