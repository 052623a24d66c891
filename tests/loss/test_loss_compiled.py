"""The loss inside a compiled step, without a graph break. Runs on the same backends as test_loss.py."""

from __future__ import annotations

import shutil

import pytest
import torch

from seppo_fast.loss import denoising_errors, loss_and_grad, preference_loss
from tests.helpers.preference_reference import PLACES

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    torch._dynamo.reset()
    yield request.param
    torch._dynamo.reset()


class _Policy(torch.nn.Module):
    """One convolution and its training step, with the gradient through autograd and from `loss_and_grad`."""

    def __init__(self, backend, device):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Conv2d(3, 3, 3, padding=1, device=device)
        self.noisy, self.target = torch.randn(4, 3, 6, 5, device=device), torch.randn(2, 3, 6, 5, device=device)
        self.options = {"beta": 50.0, "weights": torch.tensor([0.5, 1.5], device=device), "backend": backend}

    def by_autograd(self, ref):
        """Returns the loss, for the caller to differentiate."""
        return preference_loss(self.net(self.noisy), self.target, **ref, **self.options)

    def at_once(self, ref, scale, overwrite):
        """Returns loss, gradient, and the prediction whose `backward` the caller gives the gradient."""
        model_pred = self.net(self.noisy)
        options = {**self.options, "grad_scale": scale, "overwrite": overwrite}
        return *loss_and_grad(model_pred, self.target, **ref, **options), model_pred

    def gradients(self):
        """Returns the parameters' gradients and clears them."""
        found = [parameter.grad for parameter in self.parameters()]
        self.zero_grad()
        return found

    def reference(self, kind):
        """Returns the reference as a keyword argument, either `ref_pred` or `ref_error`."""
        ref_pred = torch.ones_like(self.noisy)
        return {kind: ref_pred if kind == "ref_pred" else torch.full((4,), 1.5, device=ref_pred.device)}


def _same(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("compiler", "kind"),
    [
        ("aot_eager", "ref_pred"),
        ("aot_eager", "ref_error"),
        pytest.param("inductor", "ref_pred", marks=NEEDS_COMPILER),
    ],
)
def test_training_step_through_autograd(place, compiler, kind):
    policy = _Policy(*place)
    ref = policy.reference(kind)
    expected = policy.by_autograd(ref)
    expected.loss.backward()
    gradients = policy.gradients()
    result = torch.compile(policy.by_autograd, fullgraph=True, backend=compiler)(ref)
    result.loss.backward()
    assert torch.equal(result.reject, expected.reject)
    for name in ("loss", "logit", "model_error", "ref_error", "aaf_rate", "implicit_acc"):
        _same(getattr(result, name), getattr(expected, name))
    _same(policy.gradients(), gradients)
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("compiler", "kind", "scale", "overwrite"),
    [
        ("aot_eager", "ref_pred", 0.5, False),
        ("aot_eager", "ref_error", "tensor", False),
        ("aot_eager", "ref_error", 0.5, True),
        pytest.param("inductor", "ref_error", "tensor", True, marks=NEEDS_COMPILER),
    ],
)
def test_training_step_at_once(place, compiler, kind, scale, overwrite):
    policy = _Policy(*place)
    ref = policy.reference(kind)
    scale = torch.tensor(0.5, device=policy.target.device) if scale == "tensor" else scale
    expected, grad, model_pred = policy.at_once(ref, scale, overwrite)
    model_pred.backward(grad)
    gradients = policy.gradients()
    result, compiled_grad, model_pred = torch.compile(policy.at_once, fullgraph=True, backend=compiler)(
        ref, scale, overwrite
    )
    _same(result.logit, expected.logit)
    _same(compiled_grad, grad)
    assert torch.equal(model_pred, compiled_grad) is overwrite
    model_pred.backward(compiled_grad)
    _same(policy.gradients(), gradients)


def test_prediction_from_outside_the_graph_is_overwritten(place):
    backend, device = place
    compiled = torch.compile(loss_and_grad, fullgraph=True, backend="aot_eager")
    noisy = torch.randn(4, 3, 5, device=device, requires_grad=True)
    target, ref_error = torch.randn(4, 3, 5, device=device), torch.ones(4, device=device)
    for make, keeps_its_output in ((lambda: 2 * noisy, False), (lambda: torch.tanh(noisy), True)):
        model_pred = make()
        _, expected = loss_and_grad(model_pred, target, ref_error=ref_error, backend=backend)
        _, grad = compiled(model_pred, target, ref_error=ref_error, overwrite=True, backend=backend)
        assert torch.equal(model_pred, expected)
        if keeps_its_output:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                model_pred.backward(grad)
        else:
            model_pred.backward(grad)
            _same(noisy.grad, 2 * expected)


def test_errors_made_ahead(place):
    backend, device = place
    compiled = torch.compile(denoising_errors, fullgraph=True, backend="aot_eager")
    pred, target = torch.randn(4, 3, 5, device=device, requires_grad=True), torch.randn(2, 3, 5, device=device)
    ours, expected = compiled(pred, target, backend), denoising_errors(pred, target, backend)
    _same(ours, expected)
    upstream = torch.rand(4, device=device)
    _same(*(torch.autograd.grad(errors, pred, upstream) for errors in (ours, expected)))


def test_graph_holds_the_operators_and_no_part_of_a_kernel(place):
    backend, device = place
    called = []

    def look(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, y = torch.randn(4, 3, 5, device=device), torch.randn(2, 3, 5, device=device)
    for function in (preference_loss, loss_and_grad):
        torch.compile(function, fullgraph=True, backend=look)(x, y, x, backend=backend)
    torch.compile(denoising_errors, fullgraph=True, backend=look)(x, y, backend)
    ours = [name for name in called if name.startswith("seppo_fast")]
    names = ("preference", "loss_and_grad", "denoising_errors")
    assert ours == [f"seppo_fast.{name}.default" for name in names] * (backend == "triton")
    assert any("softplus" in name for name in called) == (backend == "torch")


def test_one_compiled_function_takes_any_size_and_number(place):
    backend, device = place
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(model_pred, target, ref_error, scale):
        result, grad = loss_and_grad(model_pred, target, ref_error=ref_error, grad_scale=scale, backend=backend)
        return result.loss, grad, preference_loss(model_pred, target, ref_error=ref_error, backend=backend).loss

    for number, shape in enumerate([(6, 3, 5, 4), (4, 3, 5, 4), (8, 3, 8, 9), (2, 3, 7, 6)]):
        target = torch.randn(shape, device=device)
        model_pred = (target + 0.4).contiguous(memory_format=torch.channels_last)
        scale = torch.tensor(1.0 + number, device=device)
        ref_error = denoising_errors(target + 0.39, target, backend)
        loss, grad, again = step(model_pred, target, ref_error, scale)
        expected, expected_grad = loss_and_grad(
            model_pred, target, ref_error=ref_error, grad_scale=scale, backend=backend
        )
        for ours, theirs in ((loss, expected.loss), (again, expected.loss), (grad, expected_grad)):
            _same(ours, theirs)
    assert counter.frame_count <= 4
