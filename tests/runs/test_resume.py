"""A resumed run equals the uninterrupted run: weights, optimizer, moving average, references, log."""

from functools import partial
from pathlib import Path

import pytest

from seppo_fast.train import train
from seppo_fast.train.learner import Learner
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import log_of, tiny_config
from tests.helpers.same_run import assert_same_run

UPDATES = 6


class Stop(Exception):
    """Ends a run as a crash would."""


def stop_at(*, update):
    def observe(trainer, updates):
        if updates == update:
            raise Stop

    return observe


SETTINGS = {
    "full": {},
    "full, average": {"train": {"ema_decay": 0.9}, "reference": {"window": 3}},
    "lora, bounded": {"model": {"train": "lora"}, "reference": {"keep": 2, "redraw": "update"}},
    "lora, bf16, several uses": {
        "model": {"train": "lora", "precision": "bf16"}, "reference": {"uses": 2, "window": 2},
    },
    # The scaler skips two updates before it has found its scale.
    "half, scaled": {"model": {"precision": "fp16"}, "train": {"warmup_updates": 4, "beta": 100.0}},
    "newest": {"objective": "spin", "train": {"safeguard": True, "lr_schedule": "cosine", "warmup_updates": 2}},
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


def test_a_cosine_is_not_made_longer_or_shorter(tiny, tmp_path):
    keys = {"train": {"lr_schedule": "cosine", "warmup_updates": 2}}
    with pytest.raises(Stop):
        train(run_config(tiny, tmp_path, **keys), stop_at(update=2))
    for updates in (UPDATES + 1, UPDATES - 1):
        longer = run_config(tiny, tmp_path, train=keys["train"] | {"updates": updates})
        with pytest.raises(ConfigError, match=f"train.updates = {updates}: .* cosine schedule over {UPDATES} updates"):
            train(longer)
    config = run_config(tiny, tmp_path, **keys)
    train(config)
    rates = [entry["learning_rate"] for entry in log_of(config)]
    # Warm-up 1/2, 1; then half a cosine over the remaining four updates: 1, (1 + cos 45 degrees) / 2, ...
    cosine = [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert rates == pytest.approx([1e-3 * share for share in (0.5, 1.0, *cosine)])


def test_a_run_that_goes_on_with_other_batches_takes_the_same_pairs(tiny, tmp_path, monkeypatch):
    """If the memory preset, micro-batch and length change, each update keeps its samples, noise and learning rate."""
    taken, step = {}, Learner.step

    def recording(self, pairs, update):
        key = Path(self._config.output).name, update
        taken[key] = list(pairs.sample_ids), pairs.times.tolist(), pairs.noise.tolist()
        return step(self, pairs, update)

    monkeypatch.setattr(Learner, "step", recording)
    keys = {"updates": 3, "updates_per_iteration": 2, "pairs_per_update": 5, "warmup_updates": 3}
    config = partial(run_config, tiny, tmp_path, model={"train": "lora"})
    straight = config("straight", train=keys)
    train(straight)
    with pytest.raises(Stop):
        train(config("stopped", train=keys | {"updates": 2}), stop_at(update=1))
    with pytest.raises(ConfigError, match=r"train\.ema_decay = 0\.0, not 0\.9"):
        train(config("stopped", train=keys | {"ema_decay": 0.9}))
    resumed = config("stopped", train=keys | {"micro_batch": 3}, memory="low")
    train(resumed)
    assert len({sample for update in range(3) for sample in taken["straight", update][0]}) == 3 * 5  # none twice
    for update in range(3):
        assert taken["stopped", update] == taken["straight", update]
    rates = [[entry["learning_rate"] for entry in log_of(one)] for one in (straight, resumed)]
    assert rates == [[1e-3 / 3, 2e-3 / 3, 1e-3]] * 2
