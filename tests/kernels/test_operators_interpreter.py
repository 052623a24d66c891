"""The operators that a compiled step calls: torch's own operator checks, and their values."""

from __future__ import annotations

import pytest
import torch

import seppo_fast.kernels.preference as preference
import seppo_fast.kernels.torch_ops as operators
from seppo_fast.kernels.eager import LossForm
from tests.helpers.preference_reference import predictions

FORMS = [LossForm(20.0, -1.0, 1e-3), LossForm(20.0, -1.0, 1e-3, 2.0, 0.75)]


def _inputs(shape, kind, shared, dtype=torch.float32):
    """Returns the input tensors, of which only the prediction requires a gradient."""
    model_pred, target, ref_pred = predictions(shape, dtype, shared=shared)
    rows = shape[0]
    ref = (ref_pred, None) if kind == "ref_pred" else (None, torch.linspace(0.1, 0.3, rows))
    weights = torch.linspace(0.5, 1.5, rows // 2) if shared else None
    return model_pred, target, *ref, weights


@pytest.mark.parametrize("kind", ["ref_pred", "ref_error"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_operators_pass_torchs_checks(kind, shared):
    inputs = *_inputs((4, 35), kind, shared), *FORMS[shared]
    torch.library.opcheck(operators._preference, inputs)
    undifferentiated = (inputs[0].detach(), *inputs[1:])
    torch.library.opcheck(operators._loss_and_grad, (*undifferentiated, 3.0, None))
    torch.library.opcheck(operators._loss_and_grad, (*undifferentiated, 1.0, torch.tensor(3.0)))


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_operators_of_errors_pass_torchs_checks(shared):
    pred, target, *_ = _inputs((4, 35), "ref_pred", shared)
    torch.library.opcheck(operators._denoising_errors, (pred, target))
    torch.library.opcheck(operators._denoising_errors, (pred.detach(), target))
    for factor in (None, torch.tensor(0.5)):
        torch.library.opcheck(operators._scaled_residual, (pred.detach(), target, torch.rand(4), 2.0, factor))


def test_operators_take_strided_rows_and_targets_of_three_dims():
    pred = torch.randn(8, 3, 4, 5)[::2].flatten(1)
    target = torch.randn(4, 5, 3, 4).permute(0, 2, 3, 1)
    inputs = (pred, target, torch.randn(4, 60), None, None, *FORMS[0])
    torch.library.opcheck(operators._preference, inputs)
    torch.library.opcheck(operators._loss_and_grad, (*inputs, 1.0, None))


@pytest.mark.parametrize("kind", ["ref_pred", "ref_error"])
@pytest.mark.parametrize(("dtype", "form"), list(zip([torch.float32, torch.bfloat16], FORMS, strict=True)), ids=str)
def test_operators_are_the_kernels(kind, dtype, form):
    inputs = *_inputs((6, 35), kind, True, dtype), form
    upstream = torch.tensor(0.5)
    ours, direct = operators.preference(*inputs), preference.preference(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(ours, direct, strict=True))
    assert torch.equal(*(torch.autograd.grad(outputs[0], inputs[0], upstream)[0] for outputs in (ours, direct)))
    for scale in (0.5, torch.tensor([0.5])):
        for over in (False, True):
            found = []
            for module in (operators, preference):
                pred = inputs[0].detach().clone()
                outputs, grad = module.loss_and_grad(pred, *inputs[1:], scale, pred if over else None)
                assert (grad.data_ptr() == pred.data_ptr()) is over
                found.append((*outputs, grad))
            assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    errors = [module.denoising_errors(inputs[0], inputs[1]) for module in (operators, preference)]
    assert torch.equal(*errors)
    assert torch.equal(*(torch.autograd.grad(error, inputs[0], torch.ones(6))[0] for error in errors))
