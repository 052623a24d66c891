"""One, two and four processes over gloo get the same data and noise and train alike; if one dies, all end.

Tolerances in float32: losses and norms 1e-5 relative, weights 0.1 % of the distance that training moved them. Sums in
another order differ by some 1e-7, and Adam's first steps are the sign of a gradient that may itself be rounding.
"""

import json
import re
from types import SimpleNamespace

import pytest
import yaml

from seppo_fast.config.load import parse_config, to_yaml
from seppo_fast.runs.checkpoint import saved_states, state_folder
from tests.helpers.processes import assert_same_training, in_folder, recorded, start  # noqa: F401 - a fixture
from tests.helpers.runs import log_of, tiny_config
from tests.helpers.same_run import assert_same_run


@pytest.fixture(scope="module")
def straight(ranks, tiny, tmp_path_factory):
    """The same run by one process in four micro-batches, by two processes in two, and by four in one."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_config(
        tiny, folder, save={"minutes": 0, "keep": 9},
        train={"beta": 100.0, "pairs_per_update": 8, "micro_batch": 2, "ema_decay": 0.5, "warmup_updates": 4},
    )  # fmt: skip
    (folder / "run.yaml").write_text(to_yaml(config))
    runs = {}
    for world in (1, 2, 4):
        (folder / f"record{world}").mkdir()
        ends = ranks.run(
            world, "train", folder / "run.yaml", "--output", folder / str(world), record=folder / f"record{world}"
        )
        assert [end.code for end in ends] == [0] * world, ends[0].out
        runs[world] = folder / str(world)
    return SimpleNamespace(config=config, folder=folder, file=folder / "run.yaml", runs=runs)


@pytest.mark.parametrize("world", [2, 4])
def test_more_processes_are_given_the_same_and_train_alike(straight, start, world):  # noqa: F811
    alone = recorded(straight.folder / "record1", 1)
    assert recorded(straight.folder / f"record{world}", world) == alone and len(alone[0]) == 8
    one, many = (in_folder(straight.config, straight.runs[number]) for number in (1, world))
    assert_same_training(many, one, start)


def test_a_run_goes_on_with_half_the_processes_and_again(ranks, straight, start, tmp_path):  # noqa: F811
    for world, updates in ((4, 1), (2, 2), (1, 3)):
        ends = ranks.run(world, "train", straight.file, "--output", tmp_path / "run", "--train.updates", updates)
        assert [end.code for end in ends] == [0] * world, ends[0].out
    assert_same_training(
        in_folder(straight.config, tmp_path / "run"), in_folder(straight.config, straight.runs[1]), start
    )
    rates = [entry["learning_rate"] for entry in log_of(in_folder(straight.config, tmp_path / "run"))]
    assert rates == [1e-3 * update / 4 for update in (1, 2, 3)]  # whatever the number of processes and `train.updates`


@pytest.mark.parametrize(
    ("world", "rank", "fault", "left"),
    [(4, 2, "micro-batch@3=kill", 2), (2, 0, "save-optimizer@2=kill", 1), (2, 1, "micro-batch@3=error", 1)],
    ids=["in mid-step", "in mid-save", "an error of its own"],
)
def test_a_dead_process_ends_all_and_the_same_command_goes_on(ranks, straight, tmp_path, world, rank, fault, left):
    command = ("train", straight.file, "--output", tmp_path / "run")
    ends = ranks.run(world, *command, faults={rank: fault}, seconds=60)
    for number, end in enumerate(ends):
        if number != rank:
            assert end.code == 7, end.out
            assert "another process of this run has exited" in end.out and "the same command" in end.out
            assert "Traceback" not in end.out
    assert ends[rank].code == (-9 if fault.endswith("kill") else 70)
    newest = saved_states(tmp_path / "run")[0]
    assert newest in (state_folder(tmp_path / "run", left), state_folder(tmp_path / "run", left - 1))
    ends = ranks.run(world, *command)
    assert [end.code for end in ends] == [0] * world, ends[0].out
    assert f"resuming after update {int(newest.name[-6:])} of 3" in ends[0].out
    assert_same_run(in_folder(straight.config, tmp_path / "run"), in_folder(straight.config, straight.runs[world]))


def test_less_memory_in_one_process_leaves_all_in_step(ranks, straight, tmp_path):
    """Rollout windows depend on the sampling batch; if one process had other windows, it would wait forever."""
    sizes = ("--train.updates", 8, "--train.updates_per_iteration", 8, "--sampler.batch", 2)
    ends = ranks.run(
        2, "train", straight.file, "--output", tmp_path / "run", *sizes, faults={1: "sampling@1=memory"}, seconds=60
    )
    assert [end.code for end in ends] == [0, 0], ends[0].out
    assert re.search(r"process 1: out of memory with 2 samples; .* sampler\.batch = 1\b", ends[1].out)
    config = parse_config(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    assert config.sampler.batch == 2 and len(log_of(in_folder(straight.config, tmp_path / "run"))) == 8
    saved = json.loads((saved_states(tmp_path / "run")[0] / "numbers.json").read_text())
    assert saved["config"]["sampler"]["batch"] == 1
