"""The loss against its float64 reference, on every backend that this process can run.

That is the PyTorch twin on the CPU, and Triton too if there is a GPU. test_interpreter.py runs this file again under
Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seppo_fast.loss import PreferenceLoss, denoising_errors, dpo_loss, preference_loss, seppo_loss
from tests.helpers.preference_reference import (
    PLACES,
    ROUNDING,
    SHAPES,
    assert_matches,
    close,
    predictions,
    reference,
    relative_rms,
)

LN2 = torch.tensor(math.log(2.0), dtype=torch.float32)
FLIPPERS = ("adaptive", "indicator", "never")


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return request.param


def _weights(pairs, device):
    return torch.linspace(0.5, 1.5, pairs, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_and_gradient_match_float64(place, shape, dtype):
    backend, device = place
    cases = [("adaptive", False), ("adaptive", True), ("indicator", True), ("never", False)]
    for number, (flipper, shared) in enumerate(cases):
        weights = None if flipper == "never" else _weights(shape[0] // 2, device)
        model_pred, target, ref_pred = predictions(shape, dtype, seed=number, shared=shared, device=device)
        for ref in ({"ref_pred": ref_pred}, {"ref_error": denoising_errors(ref_pred, target, backend)}):
            options = {"beta": 100.0, "flipper": flipper, "weights": weights}
            result = preference_loss(model_pred, target, **ref, **options, backend=backend)
            (grad,) = torch.autograd.grad(3.0 * result.loss, model_pred)
            expected = reference(
                model_pred.float(), target.float(), **{k: v.float() for k, v in ref.items()}, **options
            )
            # beta/2 = 50 times the rounding error of D_w - a D_l: of products near 1e-2, or of four errors near 0.2.
            assert_matches(result, expected, atol=1e-6 if "ref_pred" in ref else 50 * 1e-7)
            assert grad.dtype == dtype
            assert relative_rms(grad, 3.0 * expected.grad) < ROUNDING[dtype]


@pytest.mark.parametrize(("dtype", "pairs"), [*itertools.product(ROUNDING, (1, 3, 7)), (torch.float32, 49)], ids=str)
def test_equal_policy_and_reference_tie_exactly(place, dtype, pairs):
    backend, device = place
    shape = (2 * pairs, 3, 5, 7)
    model_pred, target, _ = predictions(shape, dtype, shared=True, device=device)
    same = model_pred.detach().clone()
    for ref in ({"ref_pred": same}, {"ref_error": denoising_errors(same, target, backend)}):
        for flipper in FLIPPERS:
            result = preference_loss(model_pred, target, **ref, flipper=flipper, backend=backend)
            assert torch.equal(result.model_error, result.ref_error)
            assert (result.logit == 0).all()
            assert result.reject.all()
            assert result.loss.item() == LN2.item()
            assert result.aaf_rate.item() == 1.0
            assert result.implicit_acc.item() == 0.0
            (grad,) = torch.autograd.grad(result.loss, model_pred)
            both = torch.cat([target, target]).double().cpu()
            slope = 2000 / 4 / pairs * 2 * (same.double().cpu() - both) / same[0].numel()
            slope[pairs:] *= -1
            assert relative_rms(grad, slope) < ROUNDING[dtype]


def test_errors_made_ahead_are_those_of_the_loss(place):
    backend, device = place
    for shape in SHAPES:
        for shared in (False, True):
            model_pred, target, ref_pred = predictions(shape, torch.bfloat16, shared=shared, device=device)
            result = preference_loss(model_pred, target, ref_pred, backend=backend)
            assert torch.equal(result.model_error, denoising_errors(model_pred, target, backend))
            assert torch.equal(result.ref_error, denoising_errors(ref_pred, target, backend))


def test_denoising_errors_are_differentiable(place):
    backend, device = place
    for rows in (3, 4):
        pred = torch.randn(rows, 3, 5, device=device, requires_grad=True)
        target = torch.randn((rows if rows % 2 else rows // 2), 3, 5, device=device)
        both = (target if rows % 2 else torch.cat([target, target])).double()
        upstream = torch.randn(rows, device=device)
        errors = denoising_errors(pred, target, backend)
        errors.backward(upstream)
        residual = pred.detach().double() - both
        close(errors, residual.square().mean((1, 2)).cpu(), rtol=4e-7)
        assert relative_rms(pred.grad, (upstream.double()[:, None, None] * 2 * residual / 15).cpu()) < 1e-6


def _pair(winner_difference, loser_difference, place):
    """Returns one pair with target 0, latents of one element and r = 1, so that D is known exactly."""
    backend, device = place
    model_error = 1 + torch.tensor([winner_difference, loser_difference], dtype=torch.float64)
    model_pred = model_error.sqrt()[:, None].to(device).requires_grad_()
    return model_pred, torch.zeros(1, 1, device=device), torch.ones(2, device=device), backend


@pytest.mark.parametrize(
    ("winner", "tie_tol", "rejects"),
    [
        (-0.25, 0.0, True),
        (0.25, 0.0, False),
        (0.0, 0.0, True),
        (0.25, 0.3, True),
        (0.25, 0.2, False),
        (-0.25, 0.3, True),
    ],
)
def test_flippers_by_hand(place, winner, tie_tol, rejects):
    model_pred, target, ref_error, backend = _pair(winner, 0.5, place)
    for flipper, learn in zip(FLIPPERS, (-1.0, 0.0, 1.0)):
        options = {"beta": 4.0, "flipper": flipper, "tie_tol": tie_tol, "backend": backend}
        result = preference_loss(model_pred, target, ref_error=ref_error, **options)
        logit = -2.0 * (winner - (1.0 if rejects else learn) * 0.5)
        assert result.reject.item() is rejects
        assert result.logit.item() == pytest.approx(logit, abs=1e-6)
        assert result.loss.item() == pytest.approx(math.log1p(math.exp(-logit)), abs=1e-6)
        assert result.aaf_rate.item() == float(rejects)
        assert result.implicit_acc.item() == float(logit > 0)


def test_saturated_logits(place):
    model_pred, target, ref_error, backend = _pair(0.5, 0.5, place)
    result = preference_loss(model_pred, target, ref_error=ref_error, beta=1e4, backend=backend)
    assert result.loss.item() == pytest.approx(5e3, rel=1e-6)
    assert torch.autograd.grad(result.loss, model_pred)[0][:, 0].tolist() == pytest.approx(
        [1e4 * 1.5**0.5] * 2, rel=1e-5
    )
    model_pred, target, ref_error, backend = _pair(-0.5, 0.5, place)
    result = preference_loss(model_pred, target, ref_error=ref_error, beta=30.0, backend=backend)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-15.0)), rel=2e-5)
    result = preference_loss(model_pred, target, ref_error=ref_error, beta=1e4, backend=backend)
    assert result.loss.item() == 0.0
    assert torch.autograd.grad(result.loss, model_pred)[0].tolist() == [[0.0], [0.0]]


def test_beta_zero_and_weight_zero_leave_ln2(place):
    backend, device = place
    model_pred, target, ref_pred = predictions((6, 3, 5), device=device)
    for options in ({"beta": 0.0}, {"weights": torch.zeros(3, device=device)}):
        result = preference_loss(model_pred, target, ref_pred, **options, backend=backend)
        assert result.loss.item() == LN2.item()
        assert not torch.autograd.grad(result.loss, model_pred)[0].any()


def test_weights_of_any_float_dtype_and_stride(place):
    backend, device = place
    model_pred, target, ref_pred = predictions((6, 3, 5), device=device)
    wide = torch.tensor([[0.5, 9.0], [1.0, 9.0], [2.0, 9.0]], device=device)
    results = [
        preference_loss(model_pred, target, ref_pred, beta=50.0, weights=weights, backend=backend)
        for weights in (wide[:, 0], wide[:, 0].half(), wide[:, 0].double())
    ]
    assert all(torch.equal(result.logit, results[0].logit) for result in results)
    close(results[0].logit, reference(model_pred, target, ref_pred, beta=50.0, weights=wide[:, 0]).logit, 2e-6, 1e-6)


@pytest.mark.parametrize("flipper", FLIPPERS)
@pytest.mark.parametrize("poisoned", ["winner", "loser", "reference", "target", "weights"])
def test_nan_stays_visible(place, flipper, poisoned):
    backend, device = place
    # Policy and reference are far apart and D_w > 0, so with `indicator` a is 0, which must not hide a NaN in D_l.
    target = torch.zeros(6, 3, 5, device=device)
    model_pred, ref_pred = torch.full_like(target, 2.0), torch.full_like(target, 1.0)
    weights = torch.ones(3, device=device)
    place_of = {
        "winner": model_pred[1],
        "loser": model_pred[4],
        "reference": ref_pred[4],
        "target": target[1],
        "weights": weights[1:2],
    }
    place_of[poisoned].view(-1)[-1] = math.nan
    model_pred.requires_grad_()
    clean = torch.tensor([True, False, True], device=device)
    for ref in ({"ref_pred": ref_pred}, {"ref_error": denoising_errors(ref_pred, target, backend)}):
        result = preference_loss(model_pred, target, **ref, beta=1.0, flipper=flipper, weights=weights, backend=backend)
        for shown in (result.loss, result.aaf_rate, result.implicit_acc):
            assert shown.isnan()
        assert torch.equal(result.logit.isnan(), ~clean)
        assert not result.reject.any()
        (grad,) = torch.autograd.grad(result.loss, model_pred)
        assert grad[1].isnan().all() or grad[4].isnan().all()


def test_only_the_loss_and_only_model_pred_carry_gradients(place):
    backend, device = place
    inputs = [x.detach().requires_grad_() for x in predictions((4, 3, 5), device=device)]
    result = preference_loss(*inputs, backend=backend)
    carriers = [f.name for f in dataclasses.fields(result) if getattr(result, f.name).requires_grad]
    assert carriers == ["loss"]
    result.loss.backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is None
    assert inputs[2].grad is None
    with torch.no_grad():
        assert not preference_loss(*inputs, backend=backend).loss.requires_grad
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.loss = result.logit


def test_gradient_reaches_what_made_the_prediction(place):
    backend, device = place
    model_pred, target, ref_pred = predictions((4, 3, 5), torch.float16, device=device)
    scale = torch.tensor(1.0, dtype=torch.float16, device=device, requires_grad=True)
    # 2^16 is a gradient scaler's factor. A gradient rounded to float16 before it is multiplied would underflow.
    tiny = preference_loss(scale * model_pred, target, ref_pred, beta=1e-4, backend=backend).loss * 2.0**16
    (grad,) = torch.autograd.grad(tiny, model_pred)
    expected = reference(model_pred, target, ref_pred, beta=1e-4).grad * 2.0**16
    assert relative_rms(grad, expected) < 5e-4


def test_twin_never_reads_a_value_on_the_host():
    with FakeTensorMode() as mode:  # fake tensors have shapes but no values: reading a value raises
        model_pred, target, ref_pred = (torch.randn(4, 3, 5) for _ in range(3))
        model_pred.requires_grad_()
        for ref in ({"ref_pred": ref_pred}, {"ref_error": denoising_errors(ref_pred, target, "torch")}):
            result = preference_loss(model_pred, target, **ref, weights=torch.randn(2), backend="torch")
            result.loss.backward()
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            result.loss.item()
    assert model_pred.grad.shape == (4, 3, 5)
    assert mode is not None


def test_autocast_changes_nothing(place):
    backend, device = place
    inputs = predictions((4, 3, 5), torch.bfloat16, device=device)
    plain = preference_loss(*inputs, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        cast = preference_loss(*inputs, backend=backend)
    for field in dataclasses.fields(PreferenceLoss):
        assert torch.equal(getattr(plain, field.name), getattr(cast, field.name))


def test_dtypes_may_differ(place):
    backend, device = place
    model_pred, target, ref_pred = predictions((4, 3, 5), device=device)
    mixed = (model_pred.detach().bfloat16().requires_grad_(), target, ref_pred.half())
    result = preference_loss(*mixed, beta=50.0, backend=backend)
    expected = reference(*mixed, beta=50.0)
    close(result.logit, expected.logit, rtol=2e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(result.loss, mixed[0])
    assert grad.dtype == torch.bfloat16
    assert relative_rms(grad, expected.grad) < ROUNDING[torch.bfloat16]


def test_drop_in_spellings():
    model_pred, target, ref_pred = predictions((6, 3, 5))
    for short, flipper in ((seppo_loss, "adaptive"), (dpo_loss, "never")):
        result = short(model_pred, ref_pred, target, beta=70.0)
        expected = preference_loss(model_pred, target, ref_pred, beta=70.0, flipper=flipper)
        for field in dataclasses.fields(PreferenceLoss):
            assert torch.equal(getattr(result, field.name), getattr(expected, field.name))
        assert torch.equal(short(model_pred, ref_pred, target).loss, short(model_pred, ref_pred, target, 2000.0).loss)


def test_what_is_done_to_a_statistic_leaves_the_gradient_alone(place):
    backend, device = place
    model_pred, target, ref_pred = predictions((4, 3, 5), device=device)
    plain, changed = (preference_loss(model_pred, target, ref_pred, beta=20.0, backend=backend) for _ in range(2))
    changed.logit.neg_()
    changed.aaf_rate.add_(1)
    assert torch.equal(*(torch.autograd.grad(result.loss, model_pred)[0] for result in (plain, changed)))
