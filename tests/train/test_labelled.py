"""Methods that learn from labels in the data, end to end: what they compute, that they resume, what they refuse."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seppo_fast.methods.pairs import noised
from seppo_fast.runs.checkpoint import newest_state
from seppo_fast.train import train as run
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import collected, log_of, tiny_config
from tests.helpers.same_run import assert_same_run


class Ended(Exception):
    """Ends a run from outside."""


def mapo_config(tiny, tmp_path, **sections):
    sections["train"] = {"beta": 0.1, "learning_rate": 1e-4} | sections.get("train", {})
    sections["data"] = {"source": "shapes-made:20"} | sections.get("data", {})
    return tiny_config(tiny, tmp_path, objective="mapo", **sections)


@pytest.mark.parametrize("share_noise", [True, False])
def test_a_micro_batch_of_mapo_by_autograd(tiny, tmp_path, share_noise):
    trainer = Trainer(mapo_config(tiny, tmp_path, train={"share_noise": share_noise, "micro_batch": 6}))
    assert trainer.references is None
    pairs = collected(trainer, 0)
    assert pairs.losers is not None and pairs.ref_error is None and len(pairs.noise) == (6 if share_noise else 12)
    step = trainer.method.loss(trainer.policy, pairs, torch.tensor(3.0))
    assert step.output.shape == step.grad.shape == (12, 4, 8, 8) and step.halves == 2

    prediction = step.output.detach().double().requires_grad_()
    target = noised(pairs, trainer.family.schedule, trainer.denoiser.device).target.double()
    errors = (prediction - target.repeat(12 // len(target), 1, 1, 1)).square().flatten(1).mean(1)
    winner, loser = errors.chunk(2)
    ratios = [0.5 * m / torch.expm1(0.5 * m) for m in (winner, loser)]
    logit = 1000 * (ratios[0] - ratios[1])
    loss = (winner - 0.1 * F.logsigmoid(logit)).mean()
    (expected,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(step.grad.double(), 3 * expected, rtol=1e-3, atol=1e-6)
    assert step.sums["loss"].item() == pytest.approx(6 * loss.item(), rel=1e-4)
    assert step.sums["correct"] == (logit > 0).sum() and step.sums["saturated"] == (logit.abs() > 10).sum()


def test_mapo_trains_and_resumes_bit_for_bit(tiny, tmp_path):
    straight = mapo_config(tiny, tmp_path, save={"minutes": 0}, log={"health_every": 2})
    run(straight)
    log = log_of(straight)
    assert [entry["update"] for entry in log] == [1, 2, 3]
    assert all(entry["grad_norm"] > 0 and 0 <= entry["correct"] <= 1 for entry in log)
    assert {"winner_error", "loser_error", "ratio_margin", "margin_loss", "saturated"} <= log[0].keys()
    assert log[0]["loss"] == pytest.approx(log[0]["winner_error"] + log[0]["margin_loss"], rel=1e-5)
    assert log[0]["loser_grad_norm"] > 0 and log[0].get("ref_winner_error") is None

    def end(trainer, updates):
        if updates == 1:
            trainer.saver.wait()
            raise Ended

    broken = straight.model_copy(update={"output": str(tmp_path / "broken")})
    with pytest.raises(Ended):
        run(broken, end)
    assert newest_state(Path(broken.output)).update == 1
    run(broken)
    assert_same_run(straight, broken)


def test_the_micro_batch_does_not_change_what_mapo_learns(tiny, tmp_path):
    """The first update's gradient; later ones follow rounding, which Adam amplifies."""
    logs = []
    for size in (6, 4):
        train = {"micro_batch": size, "updates": 1}
        config = mapo_config(tiny, tmp_path, output=str(tmp_path / str(size)), train=train)
        run(config)
        logs.append(log_of(config)[0])
    for name in ("loss", "winner_error", "loser_error", "ratio_margin", "saturated", "grad_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5, abs=1e-7), name


def test_mapo_needs_pairs(tiny, tmp_path):
    with pytest.raises(ConfigError, match="objective 'mapo' needs two images per prompt"):
        run(mapo_config(tiny, tmp_path, data={"source": "shapes:11:3"}))
