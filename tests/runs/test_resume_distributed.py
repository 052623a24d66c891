"""Two processes: one is killed in the middle of a step, all end, and the run resumes with two processes or with one."""

import shutil
from pathlib import Path

import pytest

from seppo_fast.config.load import to_yaml
from seppo_fast.runs.checkpoint import saved_states
from seppo_fast.train import train
from tests.helpers.launch import launch
from tests.helpers.runs import log_of, tiny_config
from tests.helpers.same_run import assert_same_run

# The second of two processes fails at the given point; a single process does not fail.
SCRIPT = """
import os, sys
if os.environ.get("RANK", "0") == "1":
    os.environ["SEPPO_FAULT"] = sys.argv[1]
from seppo_fast.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_one_process_killed_ends_all_and_the_run_goes_on_with_any_number(forks, tiny, tmp_path):
    config = tiny_config(
        tiny, tmp_path, save={"minutes": 0}, reference={"redraw": "update"},
        train={"updates": 5, "beta": 100.0, "pairs_per_update": 7, "micro_batch": 2},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(processes, output, fault="none", seconds=300):
        words = (tmp_path / "script.py", fault, tmp_path / "run.yaml", "--output", tmp_path / output)
        return launch(processes, *words, folder=tmp_path, seconds=seconds)

    assert run(2, "straight").returncode == 0
    # The second process has three of the seven pairs, in micro-batches of two: its sixth is in the third update.
    killed = run(2, "killed", "micro-batch@6=kill", seconds=60 + 60)  # a minute to start in, a minute to leave in
    assert killed.returncode not in (0, None)
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    before = len(log_of(config.model_copy(update={"output": str(tmp_path / "killed")})))
    # A signal to one of them, when no state is due: both end after the update and save its state.
    (tmp_path / "run.yaml").write_text(to_yaml(config).replace("minutes: 0.0", "minutes: 60.0"))
    ended = run(2, "killed", "micro-batch@1=term", seconds=120)
    assert ended.returncode != 0 and "SIGTERM: ending after this update" in ended.stdout
    assert saved_states(tmp_path / "killed")[0].name == f"update-{before + 1:06d}"
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = run(2, "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = forks.run("train", tmp_path / "run.yaml", "--output", tmp_path / "alone")
    assert alone.code == 0, alone.err
    assert all("resuming after update " in said for said in (done.stdout, alone.out))

    straight, two, one = (
        config.model_copy(update={"output": str(tmp_path / name)}) for name in ("straight", "killed", "alone")
    )
    assert_same_run(two, straight)
    reference = config.model_copy(update={"output": str(tmp_path / "reference")})
    train(reference)
    for ours, theirs in zip(log_of(one), log_of(reference), strict=True):
        for name in ("loss", "winner_error", "ref_winner_error", "loser_error", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-3), name
    assert Path(one.output, "weights").is_dir()
