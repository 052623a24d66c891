"""An update of the learner: accumulation, warm-up, non-finite gradients, and tensors without a gradient."""

import math
from dataclasses import replace

import pytest
import torch

from seppo_fast.models.trainable import trainable
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import NonFiniteError
from tests.helpers.runs import collected, log_of, tiny_config, weights_of


@pytest.mark.parametrize(("kind", "warmup", "update"), [("full", 0, 2), ("lora", 2, 3)])
def test_what_is_cut_off_is_named_once(tiny, tmp_path, capsys, kind, warmup, update):
    cut = []

    def observe(trainer, updates):
        if not updates:
            weights = trainable(trainer.policy)
            cut.extend([next(name for name in weights if "lora_B" not in name), len(weights)])
            weights[cut[0]].register_hook(torch.zeros_like)

    sections = {"model": {"train": kind}, "sampler": {"steps": 1}, "train": {"warmup_updates": warmup}}
    train(tiny_config(tiny, tmp_path, **sections), observe)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "had no gradient" in line]
    assert line.startswith(f"1 of {cut[1]} trained tensors had no gradient in update {update}: {cut[0]}. Check ")


def test_accumulation_gives_the_same_gradient(tiny, tmp_path):
    gradients = []
    for micro_batch in (6, 4, 1):
        trainer = Trainer(tiny_config(tiny, tmp_path, train={"micro_batch": micro_batch, "beta": 50.0}))
        trainer.add_checkpoint()
        pairs = collected(trainer, 0)
        with torch.no_grad():
            for weight in trainer.policy.parameters():
                weight.mul_(1.01)  # else every pair ties
        trainer.learner._accumulate(pairs)
        gradients.append(torch.cat([weight.grad.flatten().double() for weight in trainable(trainer.policy).values()]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def test_accumulation_is_the_same_arithmetic(tiny, tmp_path):
    finals = []
    for micro_batch in (6, 2, 1):
        seen = {}
        config = tiny_config(
            tiny, tmp_path, output=str(tmp_path / str(micro_batch)),
            train={"updates": 1, "micro_batch": micro_batch, "beta": 50.0},
        )  # fmt: skip
        step = []

        def observe(trainer, updates, seen=seen, step=step):
            step.append(weights_of(trainer))
            seen["change"] = torch.cat([(step[-1][n] - step[0][n]).flatten() for n in step[0]])

        train(config, observe)
        finals.append((seen["change"], log_of(config)[0]))
    for change, entry in finals[1:]:
        # Adam's first step is the sign of the gradient, which is arbitrary if the gradient is only rounding error.
        assert (change - finals[0][0]).abs().gt(1e-5).double().mean() < 0.02
        assert entry["grad_norm"] == pytest.approx(finals[0][1]["grad_norm"], rel=1e-4)
        assert entry["winner_error"] == pytest.approx(finals[0][1]["winner_error"], rel=1e-5)


def test_warm_up_scales_the_first_updates(tiny, tmp_path):
    rates = []

    def observe(trainer, updates):
        rates.append(trainer.learner.optimizer.param_groups[0]["lr"])

    config = tiny_config(tiny, tmp_path, train={"warmup_updates": 2, "learning_rate": 1e-3})
    train(config, observe)
    assert rates[1:] == [5e-4, 1e-3, 1e-3] == [entry["learning_rate"] for entry in log_of(config)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_not_finite_is_skipped_and_the_third_in_a_row_stops(tiny, tmp_path, value, precision):
    trainer = Trainer(tiny_config(tiny, tmp_path, model={"precision": precision}, train={"beta": 20.0}))
    learner = trainer.learner
    trainer.references.add(trainer.policy)
    pairs = collected(trainer, 0)
    poisoned = replace(pairs, winners=pairs.winners.index_fill(0, torch.tensor(4), value))
    before, scale = weights_of(trainer), learner.scaler.get_scale()
    for update in range(2):
        stats = learner.step(poisoned, update)
        assert stats["skipped"] == 1 and not math.isfinite(stats["loss"])
    assert all(torch.equal(before[name], weight) for name, weight in trainable(trainer.policy).items())
    assert learner.scaler.get_scale() == scale  # the scale is not the cause
    assert learner.step(pairs, 2)["skipped"] == 0  # the count starts again
    assert all(moment.isfinite().all() for state in learner.optimizer.state.values() for moment in state.values())
    for update in range(2):
        learner.step(poisoned, update)
    with pytest.raises(NonFiniteError, match="3 times in a row"):
        learner.step(poisoned, 5)
