"""`loss_and_grad`: against float64, against autograd, in place. Runs on the same backends as test_loss.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seppo_fast.loss import PreferenceLoss, denoising_errors, loss_and_grad, preference_loss
from tests.helpers.preference_reference import (
    PLACES,
    ROUNDING,
    SHAPES,
    assert_matches,
    predictions,
    reference,
    relative_rms,
)

FIELDS = [field.name for field in dataclasses.fields(PreferenceLoss)]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return request.param


def _references(ref_pred, target, backend):
    return {"ref_pred": ref_pred}, {"ref_error": denoising_errors(ref_pred, target, backend)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_and_gradient_match_float64(place, shape, dtype):
    backend, device = place
    on_device = torch.tensor([3.0], device=device)
    cases = [
        ("adaptive", False, 3.0, False),
        ("adaptive", True, on_device, True),
        ("indicator", True, -0.25, True),
        ("never", False, on_device[0], False),
    ]
    for number, (flipper, shared, scale, overwrite) in enumerate(cases):
        weights = None if flipper == "never" else torch.linspace(0.5, 1.5, shape[0] // 2, device=device)
        inputs = predictions(shape, dtype, seed=number, shared=shared, device=device)
        model_pred, target, ref_pred = (x.detach() for x in inputs)
        for ref in _references(ref_pred, target, backend):
            options = {"beta": 100.0, "flipper": flipper, "weights": weights}
            kept = {name: x.float() for name, x in ref.items()}
            expected = reference(model_pred.float(), target.float(), **kept, **options)
            pred = model_pred.clone()
            result, grad = loss_and_grad(
                pred, target, **ref, **options, grad_scale=scale, overwrite=overwrite, backend=backend
            )
            # beta/2 = 50 times the rounding error of D_w - a D_l: of products near 1e-2, or of four errors near 0.2.
            assert_matches(result, expected, atol=1e-6 if "ref_pred" in ref else 50 * 1e-7)
            assert (grad.dtype, grad.shape) == (dtype, pred.shape)
            assert relative_rms(grad, float(scale) * expected.grad) < ROUNDING[dtype]
            assert torch.equal(pred, grad if overwrite else model_pred)
            assert (grad.data_ptr() == pred.data_ptr()) is overwrite


# The safeguard scales nothing where a = 0 or the halves' gradients do not oppose; with mu = 0 it scales some pairs.
@pytest.mark.parametrize(
    ("shape", "flipper", "more"),
    [
        ((2, 1), "adaptive", {"sft_weight": 4.0}),
        ((2, 1), "never", {"safeguard": 0.9}),
        ((10, 4, 9, 11), "adaptive", {"safeguard": 0.9}),
        ((10, 4, 9, 11), "indicator", {"sft_weight": 0.25, "safeguard": 0.5}),
        ((10, 4, 9, 11), "never", {"sft_weight": 4.0, "safeguard": 0.0}),
        ((2, 4, 64, 64), "adaptive", {"sft_weight": 0.25, "safeguard": 0.0}),
        ((2, 1, 2, 2051), "indicator", {"sft_weight": 4.0}),
        ((4, 1, 2, 2051), "never", {"sft_weight": 0.25, "safeguard": 0.5}),
    ],
    ids=str,
)
def test_winners_term_and_safeguard_match_float64(place, shape, flipper, more):
    backend, device = place
    weights = torch.linspace(0.5, 1.5, shape[0] // 2, device=device)
    for shared in (True, False):
        model_pred, target, ref_pred = predictions(shape, seed=5, shared=shared, device=device)
        for ref in _references(ref_pred, target, backend):
            options = {"beta": 70.0, "flipper": flipper, "weights": weights, **more}
            expected = reference(model_pred, target, **ref, **options)
            through = preference_loss(model_pred, target, **ref, **options, backend=backend)
            (grad,) = torch.autograd.grad(through.loss, model_pred, torch.tensor(0.5, device=device))
            result, at_once = loss_and_grad(model_pred, target, **ref, **options, grad_scale=0.5, backend=backend)
            for made, slope in ((through, grad), (result, at_once)):
                assert_matches(made, expected, atol=1e-5)
                assert relative_rms(slope, 0.5 * expected.grad) < 4e-6
            if "ref_error" in ref:
                assert torch.equal(grad, at_once)


def test_safeguard_leaves_the_winner_its_share(place):
    backend, device = place
    model_pred, target, ref_pred = (x.detach() for x in predictions((64, 3, 4), shared=True, device=device))
    # The losers' residuals are multiples of the winners', from -2 to 2.
    alike = torch.linspace(-2, 2, 32, device=device)[:, None, None]
    model_pred[32:] = target + alike * (model_pred[:32] - target)
    model_pred.requires_grad_()
    options = {"beta": 5.0, "flipper": "never", "backend": backend}
    errors = torch.autograd.grad(denoising_errors(model_pred, target, backend).chunk(2)[0].sum(), model_pred)
    own = errors[0].chunk(2)[0].double()

    def progress(safeguard):
        _, grad = loss_and_grad(model_pred, target, ref_pred, safeguard=safeguard, **options)
        winner, loser = (half.double() for half in grad.chunk(2))
        gained, taken = ((own * half).flatten(1).sum(1) for half in (winner, loser))
        return (gained + taken) / gained

    assert progress(None).min() < 0  # unscaled, some losers would undo more than the whole gain
    for mu in (0.0, 0.5, 0.9):
        shares = progress(mu)
        assert shares.min() >= mu - 1e-5
        assert (shares - mu).abs().min() < 1e-5 and shares.max() > 1  # some losers are scaled, others are not


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_gradient_is_that_of_autograd(place, dtype):
    backend, device = place
    weights = torch.tensor([0.5, 1.0, 1.5], device=device)
    for shared in (False, True):
        for scale in (1.0, 2.0**-3, 1 / 3):
            model_pred, target, ref_pred = predictions((6, 3, 5, 7), dtype, shared=shared, device=device)
            for ref in _references(ref_pred, target, backend):
                options = {"beta": 70.0, "flipper": "indicator", "weights": weights, "backend": backend}
                options |= {"sft_weight": 0.3, "safeguard": 0.25} if shared else {}
                through = preference_loss(model_pred, target, **ref, **options)
                (expected,) = torch.autograd.grad(through.loss, model_pred, torch.tensor(scale, device=device))
                result, grad = loss_and_grad(model_pred, target, **ref, **options, grad_scale=scale)
                assert all(torch.equal(getattr(result, name), getattr(through, name)) for name in FIELDS)
                # Not bit for bit otherwise: with ref_pred, autograd differentiates the twin's factored difference, and
                # the kernel multiplies by the scale in another order, which shows unless it is a power of two.
                if (backend == "torch" and "ref_error" in ref) or (backend == "triton" and scale != 1 / 3):
                    assert torch.equal(grad, expected)
                else:
                    assert relative_rms(grad, expected.double().cpu()) < ROUNDING[dtype]


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_trainers_two_ways_give_the_same_update(place, scale):
    backend, device = place
    torch.manual_seed(0)
    policy = torch.nn.Conv2d(3, 3, 3, padding=1).to(device)
    noisy, target = torch.randn(4, 3, 6, 5, device=device), torch.randn(2, 3, 6, 5, device=device)
    ref_error = torch.full((4,), 1.5, device=device)
    options = {"ref_error": ref_error, "beta": 50.0, "backend": backend}
    (scale * preference_loss(policy(noisy), target, **options).loss).backward()
    expected = [parameter.grad.clone() for parameter in policy.parameters()]
    for overwrite in (False, True):
        policy.zero_grad()
        model_pred = policy(noisy)
        result, grad = loss_and_grad(model_pred, target, **options, grad_scale=scale, overwrite=overwrite)
        assert not any(x.requires_grad for x in (grad, *(getattr(result, name) for name in FIELDS)))
        model_pred.backward(grad)  # works after overwriting, since a convolution saves its input, not its output
        for parameter, before in zip(policy.parameters(), expected):
            torch.testing.assert_close(parameter.grad, before, rtol=1e-5, atol=1e-7)


def test_autograd_notices_an_overwritten_prediction(place):
    backend, device = place
    noisy, target = torch.randn(4, 3, 5, device=device, requires_grad=True), torch.randn(4, 3, 5, device=device)
    gaps = torch.randn(4, 3, 10, device=device, requires_grad=True)
    for make in (lambda: torch.tanh(noisy), lambda: torch.tanh(gaps)[..., ::2]):
        for overwrite in (False, True):
            model_pred = make()
            ref_error = torch.zeros(4, device=device)
            _, grad = loss_and_grad(model_pred, target, ref_error=ref_error, overwrite=overwrite, backend=backend)
            if overwrite:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    model_pred.backward(grad)
            else:
                model_pred.backward(grad)


def test_overwriting_without_autograd(place):
    backend, device = place
    inputs = predictions((4, 3, 5), device=device)
    expected = loss_and_grad(*inputs, beta=50.0, backend=backend)[1]
    with torch.no_grad():
        leaf = inputs[0].detach().clone().requires_grad_()
        assert torch.equal(loss_and_grad(leaf, *inputs[1:], beta=50.0, overwrite=True, backend=backend)[1], expected)
        assert torch.equal(leaf, expected)
    with torch.inference_mode():
        inferred = [x.clone() for x in inputs]
        assert torch.equal(loss_and_grad(*inferred, beta=50.0, overwrite=True, backend=backend)[1], expected)
        assert torch.equal(inferred[0], expected)


def test_nothing_but_the_prediction_is_written(place):
    backend, device = place
    model_pred, target, ref_pred = (x.detach() for x in predictions((4, 3, 5), torch.bfloat16, device=device))
    weights, scale = torch.rand(2, device=device), torch.tensor(2.0, device=device)
    for ref in _references(ref_pred, target, backend):
        given = [target, weights, scale, *ref.values()]
        before = [x.clone() for x in given]
        for overwrite in (False, True):
            loss_and_grad(
                model_pred.clone(),
                target,
                **ref,
                weights=weights,
                grad_scale=scale,
                overwrite=overwrite,
                backend=backend,
            )
        assert all(torch.equal(x, y) for x, y in zip(given, before))


@pytest.mark.parametrize("poisoned", ["winner", "loser"])
def test_nan_reaches_its_own_pair_alone(place, poisoned):
    backend, device = place
    model_pred, target, ref_pred = (x.detach() for x in predictions((6, 3, 5), device=device))
    model_pred[1 if poisoned == "winner" else 4, -1, -1] = math.nan
    for ref in _references(ref_pred, target, backend):
        result, grad = loss_and_grad(model_pred, target, **ref, beta=1.0, backend=backend)
        assert result.loss.isnan()
        assert result.logit.isnan().tolist() == [False, True, False]
        assert grad[[1, 4]].isnan().all()
        assert grad[[0, 2, 3, 5]].isfinite().all()


def test_small_gradients_are_scaled_before_they_are_rounded(place):
    backend, device = place
    model_pred, target, ref_pred = (x.detach() for x in predictions((4, 3, 5), torch.float16, device=device))
    scale = torch.tensor(2.0**16, device=device)  # as a gradient scaler's
    _, grad = loss_and_grad(model_pred, target, ref_pred, beta=1e-4, grad_scale=scale, backend=backend)
    expected = reference(model_pred, target, ref_pred, beta=1e-4).grad
    assert (expected.abs() < 2.0**-25).any()  # would round to zero in float16
    assert relative_rms(grad, expected * 2.0**16) < ROUNDING[torch.float16]


def test_same_bits_twice(place):
    backend, device = place
    for shape in ((14, 31), (2, 17_000)):
        inputs = [x.detach() for x in predictions(shape, torch.bfloat16, device=device)]
        (first, grad), (second, again) = (loss_and_grad(*inputs, backend=backend) for _ in range(2))
        assert torch.equal(grad, again)
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in FIELDS)


def test_twin_never_reads_a_value_on_the_host():
    with FakeTensorMode() as mode:  # fake tensors have shapes but no values: reading a value raises
        model_pred, target, ref_pred = (torch.randn(4, 3, 5) for _ in range(3))
        scale = torch.tensor(2.0, device="cpu")
        for ref in _references(ref_pred, target, "torch"):
            for overwrite in (False, True):
                _, grad = loss_and_grad(
                    model_pred, target, **ref, weights=torch.randn(2), grad_scale=scale, overwrite=overwrite
                )
                assert grad.shape == (4, 3, 5)
    assert mode is not None


X = torch.zeros(4, 3, 5)
BAD = [
    ({"grad_scale": math.nan}, "grad_scale", "finite.*nan"),
    ({"grad_scale": math.inf}, "grad_scale", "finite.*inf"),
    ({"grad_scale": "1.0"}, "grad_scale", "'1.0'"),
    ({"grad_scale": None}, "grad_scale", "None"),
    ({"grad_scale": 1j}, "grad_scale", "1j"),
    ({"grad_scale": torch.ones(2)}, "grad_scale", r"one element.*\(2,\)"),
    ({"grad_scale": torch.ones((), dtype=torch.float64)}, "grad_scale", "float32.*float64"),
    ({"grad_scale": torch.ones((), dtype=torch.float16)}, "grad_scale", "float32.*float16"),
    ({"grad_scale": torch.ones((), device="meta")}, "grad_scale", "cpu.*meta"),
    ({"overwrite": True, "model_pred": torch.zeros(1, 3, 5).expand(4, 3, 5)}, "overwrite", "share memory"),
    ({"overwrite": True, "model_pred": torch.zeros(4, 3, 1).expand(4, 3, 5)}, "overwrite", "share memory"),
    ({"model_pred": torch.zeros(3, 3, 5)}, "model_pred", "even number.*3"),
    ({"target": X.to("meta")}, "target", "cpu.*meta"),
    ({"ref_error": torch.zeros(4)}, "ref_pred, ref_error", "both"),
    ({"flipper": "flip"}, "flipper", "'flip'"),
]


@pytest.mark.parametrize(("change", "name", "says"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named(change, name, says):
    with pytest.raises(ValueError, match=f"^{name}: .*{says}"):
        loss_and_grad(**{**{"model_pred": X.clone(), "target": X, "ref_pred": X}, **change})


def test_windows_of_one_memory_are_written_where_they_do_not_overlap():
    x = torch.zeros(4, 15)
    apart, overlapping = torch.zeros(66).unfold(0, 15, 17), torch.zeros(30).unfold(0, 15, 5)
    loss_and_grad(apart, x, x, overwrite=True)
    with pytest.raises(ValueError, match="^overwrite: .*share memory"):
        loss_and_grad(overlapping, x, x, overwrite=True)
