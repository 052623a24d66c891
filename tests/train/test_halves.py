"""The winners' and the losers' part of the gradient: values, sums over processes, and no effect on training."""

import math
from copy import deepcopy

import pytest
import torch
from torch.nn.functional import softplus

from seppo_fast.config.load import to_yaml
from seppo_fast.methods.pairs import noised
from seppo_fast.models.trainable import trainable
from seppo_fast.runs.journal import read_journal
from seppo_fast.runs.signals import Interrupted
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from tests.helpers.calls import denoise_unet
from tests.helpers.runs import collected, log_of, tiny_config, weights_of

NAMES = ("winner_grad_norm", "loser_grad_norm", "grad_cosine")


def moved(tiny, tmp_path, **sections):
    """Returns a trainer whose policy has moved away from its reference, and the pairs of its first update."""
    sections["train"] = {"beta": 50.0} | sections.get("train", {})
    trainer = Trainer(tiny_config(tiny, tmp_path, **sections))
    trainer.add_checkpoint()
    pairs = collected(trainer, 0)
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight.mul_(1.01)
    return trainer, pairs


def float64_halves(trainer, pairs):
    """Returns gradients of eq. 8 to 10 by autograd in float64, with the error of one half held constant."""
    policy = deepcopy(trainer.policy).double()
    shown = noised(pairs, trainer.family.schedule, torch.device("cpu"))
    prediction = denoise_unet(policy, shown.latents.double(), shown.times, shown.conditioning.map(torch.Tensor.double))
    target = shown.target.double().repeat(2, 1, 1, 1)
    winner, loser = (prediction - target).square().flatten(1).mean(1).chunk(2)
    ref_winner, ref_loser = pairs.ref_error.double().chunk(2)
    a = torch.where(winner <= ref_winner, 1.0, -1.0).detach()
    beta = trainer.config.train.beta

    def gradient(m_w, m_l):
        loss = softplus(beta / 2 * (m_w - ref_winner - a * (m_l - ref_loser))).mean()
        parts = torch.autograd.grad(loss, list(trainable(policy).values()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    return gradient(winner, loser.detach()), gradient(winner.detach(), loser)


@pytest.mark.parametrize("micro_batch", [6, 4])
def test_the_parts_are_those_of_autograd_and_add_up(tiny, tmp_path, micro_batch):
    trainer, pairs = moved(tiny, tmp_path, train={"micro_batch": micro_batch})
    w, l = float64_halves(trainer, pairs)  # noqa: E741
    stats = trainer.learner.step(pairs, 0)
    assert stats["winner_grad_norm"] == pytest.approx(w.norm().item(), rel=1e-3)
    assert stats["loser_grad_norm"] == pytest.approx(l.norm().item(), rel=1e-3)
    assert stats["grad_cosine"] == pytest.approx((w @ l / w.norm() / l.norm()).item(), abs=1e-3)
    a, b, cosine = (stats[name] for name in NAMES)
    assert math.sqrt(a * a + b * b + 2 * a * b * cosine) == pytest.approx(stats["grad_norm"], rel=1e-5)
    assert abs(cosine) < 0.9999 and a != pytest.approx(b, rel=1e-2)  # otherwise the test of the sum would be weak


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"train": "lora"}, "reference": {"errors": "together"}},
        {"model": {"train": "lora"}, "reference": {"errors": "apart"}, "train": {"share_noise": False}},
        {"model": {"precision": "bf16"}, "train": {"ema_decay": 0.5}},
        {"objective": "sft"},
    ],
    ids=["full", "together", "apart", "bf16", "sft"],
)
def test_training_does_not_notice(tiny, tmp_path, sections):
    ends, logs = [], []
    for every in (0, 1):
        config = tiny_config(tiny, tmp_path, output=str(tmp_path / str(every)), log={"health_every": every}, **sections)
        train(config, lambda trainer, updates: ends.append(weights_of(trainer)))
        logs.append(log_of(config))
    assert len(ends) == 8 and not all(torch.equal(ends[0][name], ends[3][name]) for name in ends[0])
    for without, measured in zip(ends[:4], ends[4:], strict=True):
        assert all(torch.equal(measured[name], value) for name, value in without.items())
    for without, measured in zip(*logs, strict=True):
        assert not set(NAMES) & set(without)
        assert ("winner_grad_norm" in measured) == ("objective" not in sections)
        times = ("seconds", "pairs_per_second", "memory_gib")
        assert without == {name: measured[name] for name in without} | {
            name: value for name, value in without.items() if name.endswith(times)
        }


def test_every_so_many_updates_from_the_first(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, train={"updates": 4}, sampler={"steps": 1}, log={"health_every": 3})
    train(config)
    assert [entry["update"] for entry in log_of(config) if "winner_grad_norm" in entry] == [1, 4]


def test_the_scale_of_half_precision_is_taken_out(tiny, tmp_path):
    found = []
    for precision in ("fp32", "fp16"):
        trainer, pairs = moved(tiny, tmp_path, model={"precision": precision}, output=str(tmp_path / precision))
        if trainer.learner.scaler.is_enabled():  # the initial scale is too large here
            trainer.learner.scaler.load_state_dict(trainer.learner.scaler.state_dict() | {"scale": 2.0**7})
        stats = trainer.learner.step(pairs, 0)
        found.append([stats[name] for name in NAMES])
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_numbers_that_are_not_finite_are_left_out(tiny, tmp_path):
    trainer, pairs = moved(tiny, tmp_path)
    pairs.winners[4] = math.nan
    stats = trainer.learner.step(pairs, 0)
    assert stats["skipped"] == 1 and not set(NAMES) & set(stats)


def test_no_angle_where_a_part_is_zero(tiny, tmp_path):
    """With a = 0 for every pair, the losers have no gradient."""
    trainer, pairs = moved(tiny, tmp_path, objective="seppo-indicator")
    pairs.ref_error.fill_(0.0)  # the policy is worse everywhere
    stats = trainer.learner.step(pairs, 0)
    assert stats["loser_grad_norm"] == 0 and stats["winner_grad_norm"] == pytest.approx(stats["grad_norm"], rel=1e-5)
    assert "grad_cosine" not in stats


@pytest.mark.parametrize("asked_at", [1, 2, 3, 4])
def test_an_interruption_leaves_weights_and_no_gradient_of_the_extra_pass(tiny, tmp_path, monkeypatch, asked_at):
    """Micro-batches 1 and 2 belong to the extra pass, 3 and 4 to the real one."""
    trainer, pairs = moved(tiny, tmp_path)
    before, seen = weights_of(trainer), []

    def check():
        seen.append([weight.grad for weight in trainable(trainer.policy).values()])
        if len(seen) == asked_at:
            raise Interrupted("interrupted")

    monkeypatch.setattr(trainer.interruption, "check", check)
    with pytest.raises(Interrupted):
        trainer.learner.step(pairs, 0)
    assert all(torch.equal(before[name], weight) for name, weight in trainable(trainer.policy).items())
    if asked_at <= 3:
        assert all(weight.grad is None for weight in trainable(trainer.policy).values())


def test_two_processes_and_shards_measure_what_one_does(ranks, tiny, tmp_path):
    config = tiny_config(
        tiny, tmp_path, save={"minutes": 60}, log={"health_every": 1},
        train={"beta": 100.0, "pairs_per_update": 8, "micro_batch": 2, "updates": 1},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    logs = {}
    for name, (world, fsdp) in {"one": (1, False), "copies": (2, False), "shards": (2, True)}.items():
        ends = ranks.run(world, "train", tmp_path / "run.yaml", "--output", tmp_path / name, fsdp=fsdp)
        assert [end.code for end in ends] == [0] * world, ends[0].out
        logs[name] = read_journal(tmp_path / name)
    for name in ("copies", "shards"):
        assert [logs[name][0][key] for key in NAMES] == pytest.approx([logs["one"][0][key] for key in NAMES], rel=1e-4)
        for entry in logs[name]:
            a, b, cosine = (entry[key] for key in NAMES)
            assert math.sqrt(a * a + b * b + 2 * a * b * cosine) == pytest.approx(entry["grad_norm"], rel=1e-4)
