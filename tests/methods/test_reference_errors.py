"""Three ways to compute the reference's errors: they train alike, and refuse settings that cannot work."""

import itertools
import math
import shutil
import sys
import types

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from seppo_fast.models.trainable import trainable
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import collected, log_of, tiny_config

LORA = {"train": "lora", "lora_rank": 3}


def trained(tiny, folder, errors, **sections):
    """Returns final weights and the log of 5 updates over three iterations, with smaller last micro-batches."""
    config = tiny_config(
        tiny, folder, **sections, reference={"errors": errors}, output=str(folder / errors),
        train={"updates": 5, "pairs_per_update": 7, "micro_batch": 3, "beta": 100.0},
    )  # fmt: skip
    seen = {}

    def observe(trainer, updates):
        seen.update({name: weight.detach().clone() for name, weight in trainable(trainer.policy).items()})

    train(config, observe)
    return seen, log_of(config)


def same_log(log, other, **tolerance):
    for entry, expected in zip(log, other, strict=True):
        for name, value in expected.items():
            if "seconds" not in name and "per_second" not in name and name != "memory_gib":
                assert entry[name] == pytest.approx(value, **tolerance), name


@pytest.mark.parametrize("model", [{}, LORA, LORA | {"precision": "bf16"}], ids=["full", "lora", "lora bf16"])
def test_ahead_and_apart_train_to_the_same_weights_bit_for_bit(tiny, tmp_path, model):
    weights, log = trained(tiny, tmp_path, "ahead", model=model)
    other, other_log = trained(tiny, tmp_path, "apart", model=model)
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    same_log(other_log, log, rel=0, abs=0)
    assert any(entry["logit_abs"] > 0 for entry in log)


def test_together_trains_to_the_same_weights(tiny, tmp_path):
    """Its forward may round slightly differently than two forwards, which can flip Adam's sign of a tiny gradient."""
    weights, log = trained(tiny, tmp_path, "ahead", model=LORA)
    other, other_log = trained(tiny, tmp_path, "together", model=LORA)
    start = trained_start(tiny, tmp_path)
    moved = torch.cat([(weights[name] - start[name]).flatten() for name in weights])
    apart = torch.cat([(weights[name] - other[name]).flatten() for name in weights])
    assert moved.norm() > 0
    assert apart.norm() < 1e-3 * moved.norm()
    same_log(other_log, log, rel=1e-3, abs=1e-4)


def trained_start(tiny, tmp_path):
    trainer = Trainer(tiny_config(tiny, tmp_path, model=LORA, output=str(tmp_path / "start")))
    return {name: weight.detach().clone() for name, weight in trainable(trainer.policy).items()}


@pytest.mark.parametrize("errors", ["ahead", "together", "apart"])
def test_equal_weights_give_a_difference_of_exactly_zero(tiny, tmp_path, errors):
    config = tiny_config(tiny, tmp_path, objective="seppo-newest", model=LORA, reference={"errors": errors})
    train(config)
    for entry in (log_of(config)[0], log_of(config)[2]):
        assert entry["logit_abs"] == 0 and entry["aaf_rate"] == 1
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(("model", "copies"), [({}, True), (LORA, False)], ids=["full", "lora"])
def test_apart_shares_what_is_frozen(tiny, tmp_path, model, copies):
    trainer = Trainer(tiny_config(tiny, tmp_path, model=model, reference={"errors": "apart"}))
    reference = trainer.method.strategy._reference
    shared = {weight.data_ptr() for weight in trainer.policy.parameters()} & {
        weight.data_ptr() for weight in reference.parameters()
    }
    assert bool(shared) is not copies
    trained_in_place = {weight.data_ptr() for weight in trainable(trainer.policy).values()}
    assert not trained_in_place & {weight.data_ptr() for weight in reference.parameters()}


def test_ahead_keeps_the_weights_where_they_are(tiny, tmp_path):
    """So captured graphs and compiled code stay valid."""
    trainer = Trainer(tiny_config(tiny, tmp_path))
    trainer.add_checkpoint()
    before = {name: weight.data_ptr() for name, weight in trainer.policy.named_parameters()}
    pairs = collected(trainer, 0)
    trainer.learner.step(pairs, 0)
    assert {name: weight.data_ptr() for name, weight in trainer.policy.named_parameters()} == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_code_is_exact_too(tiny, tmp_path):
    """Sampling, reference errors and the policy are compiled separately; equal weights still give equal errors."""
    config = tiny_config(
        tiny, tmp_path, objective="seppo-newest", model={"compile": True}, sampler={"batch": 12},
        train={"updates": 3, "updates_per_iteration": 2, "micro_batch": 6},
    )  # fmt: skip
    compiled = []
    train(config, lambda trainer, updates: compiled.append(trainer.policy))
    blocks = [module for module in compiled[0].modules() if type(module).__name__ == "BasicTransformerBlock"]
    assert blocks and all(block._compiled_call_impl is not None for block in blocks)
    log = log_of(config)
    assert log[0]["logit_abs"] == log[2]["logit_abs"] == 0 < log[1]["logit_abs"]
    plain = tiny_config(
        tiny, tmp_path, objective="seppo-newest", output=str(tmp_path / "plain"), sampler={"batch": 12},
        train={"updates": 3, "updates_per_iteration": 2, "micro_batch": 6},
    )  # fmt: skip
    train(plain)
    assert log[0]["winner_error"] == pytest.approx(log_of(plain)[0]["winner_error"], rel=1e-5)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"reference": {"errors": "together"}}, "needs model.train = lora.*'ahead'"),
        ({"reference": {"errors": "together"}, "model": LORA | {"compile": True}}, "model.compile needs reference"),
        ({"reference": {"uses": 4}}, "must divide train.pairs_per_update = 6"),
        ({"reference": {"errors": "before"}}, "reference.errors"),
        ({"reference": {"errors": "apart"}, "objective": "sft"}, "'sft' has no reference"),
    ],
)
def test_settings_that_cannot_work(tiny, tmp_path, sections, says):
    with pytest.raises(ConfigError, match=says):
        tiny_config(tiny, tmp_path, **sections)


def test_errors_of_many_micro_batches_take_no_more_memory_than_one(tiny, tmp_path):
    """Their forward keeps activations for a backward that never runs; they must be freed before the next forward."""
    trainer = Trainer(tiny_config(tiny, tmp_path, train={"pairs_per_update": 12, "micro_batch": 4}))
    trainer.add_checkpoint()
    peaks = []
    for count in (4, 12):
        pairs = next(collected(trainer, 0).micro_batches(count))
        trainer.method.rollout.waiting.clear()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainer.method.strategy.ahead(trainer.policy, lambda pairs=pairs: pairs)
        sizes = [event.nbytes() for event in memory_events(profiler)]
        peaks.append(max(itertools.accumulate(sizes)))
    assert peaks[1] < 1.1 * peaks[0]


def memory_events(profiler):
    events = [*profiler.profiler.kineto_results.events()]
    return sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())


def test_8_bit_adam_trains_contiguous_weights(tiny, tmp_path, monkeypatch):
    """Its step makes them contiguous; a forward in another memory format than the reference's rounds differently."""
    module = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for optimizer in ("adamw", "adamw8bit"):
        trainer = Trainer(tiny_config(tiny, tmp_path, train={"optimizer": optimizer}))
        assert trainer.policy.conv_in.weight.is_contiguous() is (optimizer == "adamw8bit")


def test_several_uses_train(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, reference={"uses": 3})
    train(config)
    assert all(math.isfinite(entry["loss"]) for entry in log_of(config))
