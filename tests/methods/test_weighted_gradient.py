"""The weighted sum of residuals against autograd in float64, on odd shapes, shared targets and half precision."""

import pytest
import torch

from seppo_fast.methods.losses.rows import mean_absolute_errors, weighted_error_gradient


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(prediction, targets, coefficients):
    leaf = prediction.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for weights, target in zip(coefficients.double(), targets, strict=True):
        whole = target.double().repeat(len(leaf) // len(target), *[1] * (leaf.dim() - 1))
        total = total + (weights * (leaf - whole).square().flatten(1).mean(1)).sum()
    return torch.autograd.grad(total, leaf)[0]


@pytest.mark.parametrize("shape", [(2, 1), (4, 3, 5, 7), (6, 1, 1, 1), (2, 4, 3, 5, 3), (2, 16_411)])
@pytest.mark.parametrize("targets", [1, 2, 3])
def test_against_autograd(shape, targets):
    prediction, those = drawn(*shape), [drawn(*shape, seed=seed + 1) for seed in range(targets)]
    coefficients = drawn(targets, shape[0], seed=9)
    got = weighted_error_gradient(prediction, those, coefficients)
    torch.testing.assert_close(got, expected(prediction, those, coefficients), rtol=1e-12, atol=1e-15)


def test_halves_share_a_target():
    prediction, target, whole = drawn(6, 3, 5), drawn(3, 3, 5, seed=1), drawn(6, 3, 5, seed=2)
    coefficients = drawn(2, 6, seed=3)
    got = weighted_error_gradient(prediction, [target, whole], coefficients)
    torch.testing.assert_close(got, expected(prediction, [target, whole], coefficients), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """Residuals and their sum are float32: the result is the exact gradient, rounded to the dtype."""
    prediction, targets = drawn(4, 3, 7).to(dtype), [drawn(4, 3, 7, seed=1).to(dtype), drawn(4, 3, 7, seed=2).float()]
    coefficients = drawn(2, 4, seed=3).float()
    got = weighted_error_gradient(prediction, targets, coefficients)
    assert got.dtype == dtype
    exact = expected(prediction, targets, coefficients)
    size = torch.finfo(dtype).eps / 2 + 2e-6
    assert ((got.double() - exact).abs() <= size * exact.abs() + 1e-6 * exact.abs().max()).all()
    absolute = (prediction.double() - targets[0].double()).abs().flatten(1).mean(1)
    torch.testing.assert_close(mean_absolute_errors(prediction, targets[0]).double(), absolute, rtol=1e-6, atol=0)


def test_memory_format_is_kept_and_inputs_are_not_written():
    prediction = drawn(2, 4, 3, 5).float().to(memory_format=torch.channels_last)
    target, coefficients = drawn(2, 4, 3, 5, seed=1).float(), drawn(1, 2, seed=2)
    before = [tensor.clone() for tensor in (prediction, target, coefficients)]
    got = weighted_error_gradient(prediction, [target], coefficients)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(*pair) for pair in zip(before, (prediction, target, coefficients), strict=True))


@pytest.mark.parametrize(
    ("targets", "coefficients", "message"),
    [
        ([], torch.ones(0, 4), "at least one target"),
        ([torch.ones(4, 3)], torch.ones(4), r"got \(4,\)"),
        ([torch.ones(4, 3)], torch.ones(1, 2), r"\(1, 4\)"),
        ([torch.ones(4, 2)], torch.ones(1, 4), r"target: expected the prediction's shape \(4, 3\)"),
        ([torch.ones(1, 3)], torch.ones(1, 4), r"got \(1, 3\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(targets, coefficients, message):
    with pytest.raises(ValueError, match=message):
        weighted_error_gradient(torch.ones(4, 3), targets, coefficients)
