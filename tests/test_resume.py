"""A run that was interrupted and goes on is the run that was not: weights, optimizer, average, references, log."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.faults import contents, differences
from seppo_fast.saved_state import saved_states
from seppo_fast.train import train
from tests.runs import tiny_config

UPDATES = 6


class Stop(Exception):
    """Ends a run as a crash would."""


def stop_at(*, update):
    def observe(trainer, updates):
        if updates == update:
            raise Stop

    return observe


def content(run):
    """All that a run computed: the tensors of its weights and of its last state, its references, its log."""
    run = Path(run)
    found = {}
    for file in sorted([*run.rglob("weights/**/*.safetensors"), *saved_states(run)[0].rglob("*.safetensors")]):
        tensors = load_file(file)
        found |= {f"{file.relative_to(run)} {name}": tensor for name, tensor in tensors.items()}
    return found


def assert_same_run(first, second):
    ours = contents(Path(first.output))
    assert len(ours) > 1 and differences(ours, Path(second.output)) == []


SETTINGS = {
    "full": {},
    "full, average": {"train": {"ema_decay": 0.9}, "reference": {"window": 3}},
    "lora, bounded": {"model": {"train": "lora"}, "reference": {"keep": 2, "redraw": "update"}},
    "lora, bf16, several uses": {
        "model": {"train": "lora", "precision": "bf16"}, "reference": {"uses": 2, "window": 2},
    },
    # The scaler skips two updates before it has its scale.
    "half, scaled": {"model": {"precision": "fp16"}, "train": {"warmup_updates": 4, "beta": 100.0}},
    "newest": {"objective": "spin"},
    "no reference": {"objective": "sft"},
    "apart": {"reference": {"errors": "apart"}},
}  # fmt: skip


def run_config(tiny, folder, name="run", **sections):
    train_keys = {"updates": UPDATES, "updates_per_iteration": 4, "pairs_per_update": 6} | sections.pop("train", {})
    return tiny_config(
        tiny, folder, output=str(folder / name), train=train_keys, save={"minutes": 0}, sampler={"batch": 5}, **sections
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_that_stops_after_every_update_is_the_run_that_does_not(tiny, tmp_path, settings):
    straight = run_config(tiny, tmp_path, "straight", **settings)
    train(straight)
    stopped = run_config(tiny, tmp_path, "stopped", **settings)
    for update in range(1, UPDATES):
        with pytest.raises(Stop):
            train(stopped, stop_at(update=update))
    train(stopped)
    assert_same_run(straight, stopped)
