"""The objectives: the loss of each compared with its formula in float64, and the averages in the log."""

import math

import pytest
import torch

from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.methods.preference import averages, step_loss
from tests.helpers.preference_reference import reference

OPTIONS = {"beta": 500.0, "tie_tol": 0.0, "backend": "torch"}
ANCHOR = {"adaptive": -1.0, "indicator": 0.0, "never": 1.0}


def batch(pairs=5, latent=(4, 3, 5)):
    generator = torch.Generator().manual_seed(3)
    pred, target = torch.randn(2, 2 * pairs, *latent, generator=generator).unbind()
    ref_error = (pred - target).square().flatten(1).mean(1) + 1e-3 * torch.randn(2 * pairs, generator=generator)
    return pred.requires_grad_(), target, ref_error


WITH_A_REFERENCE = [
    name for name, row in OBJECTIVES.items() if row.draw and row.flipper in ANCHOR and row.loss == "preference"
]


@pytest.mark.parametrize("name", WITH_A_REFERENCE)
def test_each_row_is_its_formula(name):
    objective = OBJECTIVES[name]
    pred, target, ref_error = batch()
    step = step_loss(objective, pred, target, ref_error, **OPTIONS, grad_scale=3.0)

    p = pred.detach().double().requires_grad_()
    difference = (p - target.double()).square().flatten(1).mean(1) - ref_error.double()
    winner, loser = difference.chunk(2)
    a = torch.where(winner <= 0, 1.0, ANCHOR[objective.flipper]).detach()
    logit = -250 * (winner - a * loser)
    loss = torch.nn.functional.softplus(-logit).mean()
    (expected,) = torch.autograd.grad(loss, p)
    torch.testing.assert_close(step.grad.double(), 3 * expected, rtol=1e-3, atol=1e-6)
    assert 0 < (winner <= 0).sum() < 5  # both branches were taken

    means = averages({key: value.item() for key, value in step.sums.items()}, 5)
    assert means["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert means["aaf_rate"] == pytest.approx((winner <= 0).double().mean().item())
    assert means["margin"] == pytest.approx((winner - a * loser).mean().item(), abs=1e-6)  # float32 errors near 2
    assert means["implicit_acc"] == pytest.approx((logit > 0).double().mean().item())
    rejected = winner <= 0
    assert means["implicit_acc_rejected"] == pytest.approx((logit > 0)[rejected].double().mean().item())
    assert means["implicit_acc_learned"] == pytest.approx((logit > 0)[~rejected].double().mean().item())


def test_sft_is_the_mean_squared_error_on_winners():
    generator = torch.Generator().manual_seed(0)
    pred, target = torch.randn(2, 3, 4, 5, 5, generator=generator).unbind()
    pred.requires_grad_()
    difference = pred.detach().double() - target.double()
    for scale in (3.0, torch.tensor(3.0)):
        step = step_loss(OBJECTIVES["sft"], pred, target, None, **OPTIONS, grad_scale=scale)
        torch.testing.assert_close(step.sums["loss"].double(), 3 * difference.square().mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(step.grad.double(), 6 * difference / difference.numel(), rtol=1e-5, atol=1e-9)


def test_winners_term_and_safeguard_reach_the_loss_and_the_log():
    pred, target, ref_error = batch()
    options = OPTIONS | {"sft_weight": 2.0, "safeguard": 0.5}
    step = step_loss(OBJECTIVES["spin"], pred, target, ref_error, **options, grad_scale=3.0)
    expected = reference(pred, target, ref_error=ref_error, beta=500.0, flipper="never", sft_weight=2.0, safeguard=0.5)
    torch.testing.assert_close(step.grad.double(), 3 * expected.grad, rtol=1e-3, atol=1e-6)
    plain = step_loss(OBJECTIVES["spin"], pred, target, ref_error, **OPTIONS, grad_scale=3.0)
    assert "sft_loss" not in plain.sums and plain.sums["preference_loss"] == plain.sums["loss"]
    means = averages({key: value.item() for key, value in step.sums.items()}, 5)
    assert means["sft_loss"] == pytest.approx(2 * 125 * means["winner_error"], rel=1e-5)
    assert means["loss"] == pytest.approx(means["preference_loss"] + means["sft_loss"], rel=1e-6)
    assert means["preference_loss"] == pytest.approx(plain.sums["loss"].item() / 5, rel=1e-6)


def test_micro_batches_add_up():
    pred, target, ref_error = batch(pairs=6)
    objective = OBJECTIVES["seppo"]

    def step(rows):
        share = len(rows) / 12
        return step_loss(objective, pred[rows], target[rows], ref_error[rows], **OPTIONS, grad_scale=share)

    whole = step(list(range(12)))
    parts = [step([0, 1, 2, 3, 6, 7, 8, 9]), step([4, 5, 10, 11])]
    for name, value in whole.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), value, rtol=1e-5, atol=1e-6)
    pieces = [part.grad.chunk(2) for part in parts]
    gradient = torch.cat([winners for winners, _ in pieces] + [losers for _, losers in pieces])
    torch.testing.assert_close(gradient, whole.grad)


def test_a_group_without_pairs_is_left_out():
    sums = {"loss": 2 * math.log(2), "reject": 2.0, "correct": 0.0, "correct_and_reject": 0.0}
    means = averages(sums, 2)
    assert means["aaf_rate"] == 1 and means["implicit_acc_rejected"] == 0
    assert "implicit_acc_learned" not in means
