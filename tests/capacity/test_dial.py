"""The `memory` preset: what it fills in and from how much memory."""

from pathlib import Path

import pytest
import torch

import seppo_fast.capacity.presets
from seppo_fast.capacity.footprint import sampling_footprint, training_footprint
from seppo_fast.capacity.presets import MEMORY_PRESETS, apply_preset, fit_to_device
from seppo_fast.config.load import parse_config, read_config
from seppo_fast.models.trainable import trainable
from seppo_fast.references.layout import PackedLayout
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from tests.helpers.calls import denoise_unet, inputs_of
from tests.helpers.runs import tiny_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# `log.health_every` is off, so that no winners' gradient is stored; test_estimate.py covers that.
OPEN = {
    "train": {"micro_batch": None, "pairs_per_update": 24}, "sampler": {"batch": None}, "log": {"health_every": 0},
}  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "device", "checkpointing", "compiled"),
    [
        ("low", CUDA, True, False),
        ("balanced", CUDA, False, False),
        ("fast", CUDA, False, True),
        ("fast", CPU, False, False),
    ],
)
def test_what_the_dial_decides_before_the_model_is_made(memory, device, checkpointing, compiled):
    model = apply_preset(parse_config({"memory": memory}), device).model
    assert (model.gradient_checkpointing, model.compile) == (checkpointing, compiled)


def test_what_is_given_wins_over_the_dial():
    config = parse_config({"memory": "low", "model": {"gradient_checkpointing": False, "compile": True}})
    assert apply_preset(config, CUDA).model == config.model
    online = parse_config({"memory": "fast", "reference": {"errors": "apart"}})
    assert apply_preset(online, CUDA).model.compile is False


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """Caches counts: one takes a second, and these tests repeat the same ones."""

    def once(count):
        known = {}

        def counting(model, denoise, inputs, **others):
            key = id(model), model.is_gradient_checkpointing, str([tuple(t.shape) for t in inputs(1)[:2]]), str(others)
            if key not in known:
                known[key] = model, count(model, denoise, inputs, **others)  # keeps the model, so its id is not reused
            return known[key][1]

        return counting

    for count in (training_footprint, sampling_footprint):
        monkeypatch.setattr(seppo_fast.capacity.presets, count.__name__, once(count))


@pytest.fixture
def trainer(tiny, tmp_path):
    return Trainer(tiny_config(tiny, tmp_path))


def chosen(trainer, config):
    config = fit_to_device(apply_preset(config, CPU), trainer.family, trainer.processes)
    return config.train.micro_batch, config.sampler.batch


def test_batches_are_the_largest_that_fit(tiny, tmp_path, trainer, monkeypatch):
    """What fits beside Adam's moments and the pool: exactly the expected rows, and with slightly less memory fewer."""
    trained = sum(weight.numel() * 4 for weight in trainable(trainer.policy).values())
    slab = PackedLayout.of(trainer.policy).size
    pool = 3 * slab  # two past policies and the resident one
    asked = trainer.policy, denoise_unet, inputs_of((4, 8, 8), (16, 16)), torch.float32, CPU
    pair, sample = training_footprint(*asked), sampling_footprint(*asked, guided=True)
    share = MEMORY_PRESETS["balanced"].share
    for pairs, samples in ((4, 8), (8, 16), (1, 4)):
        for spare, rows in ((1.001, pairs), (0.999, pairs // 2 or 1)):
            need = spare * (2 * trained + pool + pair.fixed + pairs * pair.per_row) / share
            monkeypatch.setattr(seppo_fast.capacity.presets, "free_bytes", lambda device, need=need: int(need))
            assert (
                chosen(trainer, tiny_config(tiny, tmp_path, reference={"host_gib": 4 * slab / 2**30}, **OPEN))[0]
                == rows
            )
        for spare, rows in ((1.001, samples), (0.999, samples // 2)):
            need = spare * (2 * trained + pool + sample.fixed + samples * sample.per_row) / share
            monkeypatch.setattr(seppo_fast.capacity.presets, "free_bytes", lambda device, need=need: int(need))
            assert (
                chosen(trainer, tiny_config(tiny, tmp_path, reference={"host_gib": 4 * slab / 2**30}, **OPEN))[1]
                == rows
            )


def test_batches_have_a_ceiling_and_one_is_always_tried(tiny, tmp_path, trainer, monkeypatch):
    monkeypatch.setattr(seppo_fast.capacity.presets, "free_bytes", lambda device: 2**50)
    for memory, expected in (("low", (1, 8)), ("balanced", (16, 32)), ("fast", (16, 32))):
        assert chosen(trainer, tiny_config(tiny, tmp_path, memory=memory, **OPEN)) == expected
    few = {"train": {"micro_batch": None, "pairs_per_update": 5}}
    assert chosen(trainer, tiny_config(tiny, tmp_path, **few)) == (4, 4)  # at most what an update has
    monkeypatch.setattr(seppo_fast.capacity.presets, "free_bytes", lambda device: 0)
    assert chosen(trainer, tiny_config(tiny, tmp_path, **OPEN)) == (1, 1)


def test_all_processes_take_the_smallest_choice(tiny, tmp_path, trainer, monkeypatch):
    monkeypatch.setattr(seppo_fast.capacity.presets, "free_bytes", lambda device: 2**50)
    monkeypatch.setattr(trainer.processes, "min", lambda mine: min(mine, 3))
    assert chosen(trainer, tiny_config(tiny, tmp_path, **OPEN)) == (3, 3)


@pytest.mark.parametrize("memory", list(MEMORY_PRESETS))
def test_a_run_stores_what_was_chosen(tiny, tmp_path, memory):
    config = tiny_config(tiny, tmp_path, memory=memory, **OPEN)
    train(config)
    stored = read_config(Path(config.output) / "config.yaml")
    assert stored.train.micro_batch and stored.sampler.batch
    assert stored.model.attention == "sdpa" and stored.model.compile is False
    assert stored.model.gradient_checkpointing is (memory == "low")
    assert stored.memory == memory


def test_what_the_learner_holds_is_parked_where_few_samples_fit_beside_it(tiny, tmp_path, trainer, monkeypatch):
    trained = sum(weight.numel() * 4 for weight in trainable(trainer.policy).values())
    slab = PackedLayout.of(trainer.policy).size
    pool = 3 * slab  # two past policies and the resident one
    inputs = inputs_of((4, 8, 8), (16, 16))
    sample = sampling_footprint(trainer.policy, denoise_unet, inputs, torch.float32, CPU, guided=True)
    config = tiny_config(tiny, tmp_path, reference={"host_gib": 4 * slab / 2**30}, **OPEN)
    for spare, park in ((1.001, False), (0.999, True)):
        free = int(spare * (2 * trained + pool + sample.fixed + 16 * sample.per_row) / MEMORY_PRESETS["balanced"].share)
        monkeypatch.setattr(seppo_fast.capacity.presets, "free_bytes", lambda device, free=free: free)
        chosen = seppo_fast.capacity.presets._with_batch(config, trainer.policy, sample, trainer.processes)
        assert chosen.reference.park is park
        assert chosen.sampler.batch >= 16  # 16 samples fit once the state is parked
