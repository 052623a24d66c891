"""What only a GPU can show: graphs, streams, launches, host syncs, more than 2^31 elements, the sanitizer."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import seppo_fast.kernels.preference as preference
from seppo_fast.loss import denoising_errors, loss_and_grad, preference_loss
from tests.helpers.preference_reference import ROUNDING, predictions, reference, relative_rms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SD15, SDXL = (8, 4, 64, 64), (4, 4, 128, 128)  # one chunk per latent; four chunks per latent
FORWARD, BACKWARD = "_preference_fwd_kernel", "_errors_bwd_kernel"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


class _Step:
    """Loss and gradient of some pairs, whose tensors keep their addresses."""

    def __init__(self, shape=SD15, dtype=torch.bfloat16, *, at_once=True, seed=0):
        inputs = predictions(shape, dtype, seed=seed, shared=True, device="cuda")
        self.inputs = [inputs[0].detach().requires_grad_(), *inputs[1:]]
        self.ref_error = denoising_errors(self.inputs[2], self.inputs[1])
        self.scale = torch.tensor(3.0, device="cuda")
        self.at_once = at_once

    def __call__(self, kind="ref_pred"):
        model_pred, target, ref_pred = self.inputs
        ref = {"ref_pred": ref_pred} if kind == "ref_pred" else {"ref_error": self.ref_error}
        if self.at_once:
            result, grad = loss_and_grad(model_pred, target, **ref, beta=100.0, grad_scale=self.scale)
        else:
            result = preference_loss(model_pred, target, **ref, beta=100.0)
            (grad,) = torch.autograd.grad(result.loss, model_pred, self.scale)
        return [x.detach() for x in (result.loss, result.logit, result.model_error, result.reject, grad)]

    def refill(self, seed):
        """Writes other numbers into the same memory."""
        fresh = predictions(tuple(self.inputs[0].shape), self.inputs[0].dtype, seed=seed, shared=True, device="cuda")
        with torch.no_grad():
            for old, new in zip(self.inputs, fresh):
                old.copy_(new)
            self.ref_error.copy_(denoising_errors(self.inputs[2], self.inputs[1]))


def _copied(outputs):
    return [x.clone() for x in outputs]


def _same_bits(ours, expected):
    assert all(torch.equal(x, y) for x, y in zip(ours, expected, strict=True))


def _kernels(call: Callable[[], object]) -> list[str]:
    """Returns the names of everything that the GPU ran, including copies and fills."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.parametrize("shape", [SD15, SDXL], ids=["SD-1.5", "SDXL"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("at_once", [False, True], ids=["autograd", "at once"])
def test_values_and_gradient_match_float64(shape, dtype, at_once):
    step = _Step(shape, dtype, at_once=at_once)
    model_pred, target, ref_pred = step.inputs
    for kind, ref in (("ref_pred", ref_pred.float()), ("ref_error", step.ref_error)):
        expected = reference(model_pred.float(), target.float(), **{kind: ref}, beta=100.0)
        loss, logit, model_error, reject, grad = (x.cpu() for x in step(kind))
        atol = 1e-6 if kind == "ref_pred" else 50 * 1e-7
        torch.testing.assert_close(logit.double(), expected.logit, rtol=2e-6, atol=atol)
        torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-6, atol=atol)
        torch.testing.assert_close(model_error.double(), expected.model_error, rtol=4e-7, atol=0)
        assert torch.equal(reject, expected.reject)
        assert relative_rms(grad, 3.0 * expected.grad) < ROUNDING[dtype]
        _same_bits(step(kind), step(kind))


@pytest.mark.parametrize("shape", [SD15, SDXL], ids=["SD-1.5", "SDXL"])
def test_launches(shape):
    at_once, through = _Step(shape), _Step(shape, at_once=False)
    in_one = shape == SD15
    for kind in ("ref_pred", "ref_error"):
        assert _kernels(lambda kind=kind: at_once(kind)) == ([FORWARD] if in_one else [FORWARD, BACKWARD])
        assert _kernels(lambda kind=kind: through(kind)) == [FORWARD, BACKWARD]


def test_gpu_is_never_waited_for():
    steps = [_Step(shape, at_once=at_once) for shape in (SD15, SDXL) for at_once in (False, True)]
    weights = torch.rand(SD15[0] // 2, device="cuda", dtype=torch.float16)
    for mode in ("default", "error"):  # the first pass loads the kernels, which synchronizes
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for step in steps:
                step("ref_pred")
                step("ref_error")
            model_pred, target, ref_pred = steps[0].inputs
            loss_and_grad(model_pred.detach().clone(), target, ref_pred, weights=weights, overwrite=True)
            channels_last = model_pred.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
            preference_loss(channels_last, target, ref_pred, weights=weights).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _captured(step):
    """Captures a CUDA graph of the step; returns it and the outputs that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


@pytest.mark.parametrize("shape", [SD15, SDXL], ids=["SD-1.5", "SDXL"])
@pytest.mark.parametrize("at_once", [False, True], ids=["autograd", "at once"])
def test_graph_replays_with_other_numbers(shape, at_once):
    step = _Step(shape, at_once=at_once)
    graph, outputs = _captured(step)
    for seed in (1, 2, 3):
        step.refill(seed)
        graph.replay()
        _same_bits(outputs, step())


def test_graphs_and_eager_calls_take_turns():
    steps = [_Step(SD15, at_once=True, seed=1), _Step(SDXL, at_once=False, seed=2), _Step(SDXL, at_once=True, seed=3)]
    expected = [_copied(step()) for step in steps]
    graphs = [_captured(step) for step in steps[:2]]
    found = []
    for _ in range(20):
        for number, (graph, outputs) in enumerate(graphs):
            for x in outputs:
                x.zero_()
            graph.replay()
            found.append((number, _copied(outputs)))
            found.append((2, steps[2]()))
    for number, outputs in found:
        _same_bits(outputs, expected[number])


def test_two_streams_at_once():
    steps = [_Step((2048, 4, 64, 64), seed=1), _Step((512, 4, 128, 128), seed=2, at_once=False)]
    expected = [_copied(step()) for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    found = [[], []]
    torch.cuda.synchronize()
    for _ in range(10):
        for step, stream, outputs in zip(steps, streams, found):
            with torch.cuda.stream(stream):
                outputs.append(step()[:4])
    torch.cuda.synchronize()
    for outputs, of_one in zip(found, expected):
        for values in outputs:
            _same_bits(values, of_one[:4])
    assert all(ticket.item() == 0 for ticket in preference._tickets.values())


def test_many_pairs_have_exact_means():
    """Thousands of programs race for the last ticket; the mean of equal numbers must be exactly that number."""
    model_pred = torch.randn(2 * 10_007, 64, device="cuda", dtype=torch.bfloat16)
    target = torch.randn(10_007, 64, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        result, _ = loss_and_grad(model_pred, target, model_pred.clone())
        assert result.loss.item() == torch.tensor(math.log(2.0)).item()
        assert result.aaf_rate.item() == 1.0
        assert result.implicit_acc.item() == 0.0


@pytest.mark.parametrize("size", [16_384, 65_536], ids=["one chunk", "chunks"])
def test_more_than_two_to_the_31_elements(size):
    pairs = 2**30 // size + 1
    rows = 2 * pairs
    needed = 2 * rows * size + 2**30  # only the predictions: the gradient overwrites them, the target has one row
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    model_pred = torch.empty(rows, size, dtype=torch.float16, device="cuda").normal_()
    assert model_pred.numel() > 2**31
    target = torch.randn(1, size, dtype=torch.float16, device="cuda").expand(pairs, size)
    ref_error = torch.ones(rows, device="cuda")
    some = torch.tensor([0, 1, pairs - 1, pairs, rows - 2, rows - 1])
    before = model_pred[some.cuda()].double().cpu()
    result, grad = loss_and_grad(model_pred, target, ref_error=ref_error, beta=2.0, grad_scale=2.0**20, overwrite=True)
    residual = before - target[:1].double().cpu()
    torch.testing.assert_close(result.model_error.cpu()[some].double(), residual.square().mean(1), rtol=4e-7, atol=0)
    pair = some % pairs
    slope = torch.sigmoid(-result.logit.cpu().double()[pair]) / pairs * 2.0**20
    flip = torch.where(result.reject.cpu()[pair], 1.0, -1.0)
    slope = torch.where(some < pairs, slope, -flip * slope)
    expected = slope[:, None] * 2 * residual / size
    assert relative_rms(grad[some.cuda()], expected) < 2e-3
    assert result.loss.isfinite()


def test_gradient_scaler_stays_on_the_device():
    torch.manual_seed(0)
    policy = torch.nn.Conv2d(4, 4, 3, padding=1, device="cuda")
    noisy, target = (torch.randn(4, 4, 16, 16, device="cuda") for _ in range(2))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
    gradients = []
    for scaled in (False, True):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            model_pred = policy(noisy)
        options = {"ref_error": torch.ones(4, device="cuda"), "beta": 10.0}
        if scaled:
            factor = scaler.scale(torch.ones((), device="cuda"))
            _, grad = loss_and_grad(model_pred, target, **options, grad_scale=factor)
            model_pred.backward(grad)
            scaler.unscale_(optimizer)
        else:
            preference_loss(model_pred.float(), target, **options).loss.backward()
        gradients.append(policy.weight.grad.double().cpu())
    assert relative_rms(gradients[1], gradients[0]) < 5e-3


@pytest.mark.parametrize("at_once", [False, True], ids=["autograd", "at once"])
def test_compiled_step_in_graphs(at_once):
    torch._dynamo.reset()
    policy = torch.nn.Conv2d(4, 4, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    target, ref_pred = (torch.randn(4, 4, 16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def forward(noisy):
        model_pred = policy(noisy)
        if at_once:
            result, grad = loss_and_grad(model_pred, target, ref_pred, beta=10.0)
            return result.loss, result.logit, model_pred, grad
        result = preference_loss(model_pred, target, ref_pred, beta=10.0)
        return result.loss, result.logit

    def step(call, noisy):
        policy.zero_grad()
        loss, logit, *backward = call(noisy)
        if at_once:
            backward[0].backward(backward[1])
        else:
            loss.backward()
        return _copied([loss.detach(), logit.detach(), policy.weight.grad])

    compiled = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):  # warms up, captures, replays
        noisy = torch.randn(4, 4, 16, 16, device="cuda", dtype=torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(step(compiled, noisy), step(forward, noisy), rtol=2e-2, atol=1e-3)
    torch._dynamo.reset()


SANITIZED = """
import torch
from seppo_fast.loss import denoising_errors, loss_and_grad, preference_loss
for shape in ((6, 4, 31), (4, 4, 64, 64), (4, 17_001)):
    pred, ref_pred = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    target = torch.randn(shape, device="cuda")[: shape[0] // 2]
    pred.requires_grad_()
    for ref in ({"ref_pred": ref_pred}, {"ref_error": denoising_errors(ref_pred, target)}):
        preference_loss(pred, target, **ref).loss.backward()
        loss_and_grad(pred, target, **ref)
torch.cuda.synchronize()
"""


@pytest.mark.sanitizer
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # PyTorch probes for functions that older drivers lack
    command += [sys.executable, "-c", SANITIZED]
    # Each tensor gets its own allocation, so that an access beyond its end is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    place = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
