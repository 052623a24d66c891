"""The loss's Triton kernels under the interpreter, mostly with smaller chunks than on a GPU.

tests/loss/test_interpreter.py starts the process.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

import seppo_fast.kernels.denoising_error as errors
import seppo_fast.kernels.eager as eager
import seppo_fast.kernels.preference as preference
from seppo_fast.loss import PreferenceLoss, denoising_errors, loss_and_grad, preference_loss
from tests.helpers.preference_reference import assert_matches, predictions, reference, relative_rms
from tests.kernels.launches import launches


@pytest.fixture
def poisoned_memory():
    """Makes `torch.empty` return memory filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small(monkeypatch):
    """Sets chunks of two folds of 16 elements, and blocks of two pairs."""
    _divide(monkeypatch, lanes=16, folds=2, pair_lanes=2)


def _divide(monkeypatch, lanes, folds, pair_lanes):
    monkeypatch.setitem(errors.DIVISIONS, errors.DEFAULT, (lanes, folds))
    monkeypatch.setattr(preference, "PAIR_LANES", pair_lanes)


def _values(result):
    return tuple(getattr(result, field.name) for field in dataclasses.fields(PreferenceLoss))


def _all_results(model_pred, target, ref, **options):
    """Returns results and gradients: through autograd, and at once in new memory and over the prediction."""
    through = preference_loss(model_pred, target, **ref, **options, backend="triton")
    results = [(through, *torch.autograd.grad(through.loss, model_pred))]
    for overwrite in (False, True):
        pred = model_pred.detach().clone()
        results.append(loss_and_grad(pred, target, **ref, **options, overwrite=overwrite, backend="triton"))
    return results


def _references(ref_pred, target):
    return {"ref_pred": ref_pred}, {"ref_error": denoising_errors(ref_pred, target, "triton")}


def _check(shape, shared, dtype=torch.float32):
    model_pred, target, ref_pred = predictions(shape, dtype, shared=shared)
    options = {"beta": 20.0, "weights": torch.linspace(0.5, 1.5, shape[0] // 2)}
    for ref in _references(ref_pred, target):
        kept = {name: x.float() for name, x in ref.items()}
        expected = reference(model_pred.float(), target.float(), **kept, **options)
        for result, grad in _all_results(model_pred, target, ref, **options):
            assert_matches(result, expected, atol=2e-6)
            assert relative_rms(grad, expected.grad) < (2e-6 if dtype == torch.float32 else 5e-4)


def test_this_process_interprets():
    assert errors.INTERPRETED


# One and several chunks, one and several blocks of pairs, odd and even numbers of each.
@pytest.mark.parametrize("shape", [(2, 1), (6, 4, 5, 7), (14, 31), (10, 33), (4, 129)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_many_small_chunks_and_blocks_of_pairs(shape, shared, small, poisoned_memory):
    _check(shape, shared)


@pytest.mark.parametrize("shape", [(2, 1), (14, 31), (4, 129)], ids=str)
@pytest.mark.parametrize("flipper", ["adaptive", "indicator", "never"])
def test_winners_term_and_safeguard_in_small_chunks(shape, flipper, small, poisoned_memory):
    model_pred, target, ref_pred = predictions(shape, shared=len(shape) > 2)
    weights = torch.linspace(0.5, 1.5, shape[0] // 2)
    for more in ({"sft_weight": 4.0}, {"safeguard": 0.9}, {"sft_weight": 0.5, "safeguard": 0.0}):
        options = {"beta": 20.0, "weights": weights, "flipper": flipper, **more}
        for ref in _references(ref_pred, target):
            expected = reference(model_pred, target, **ref, **options)
            for result, grad in _all_results(model_pred, target, ref, **options):
                assert_matches(result, expected, atol=2e-6)
                assert relative_rms(grad, expected.grad) < 2e-6


@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97])
def test_borders_of_folds_and_chunks(size, small, poisoned_memory):
    _check((2, size), shared=True)


@pytest.mark.parametrize("size", [2047, 2049, 4097, 16_383, 16_384, 16_385])
def test_borders_at_the_sizes_of_a_gpu(size, poisoned_memory):
    _check((2, size), shared=True, dtype=torch.float16)


@pytest.mark.parametrize(
    ("lanes", "folds", "shape"),
    [(2048, 8, (2, 17_000)), (64, 8, (4, 600)), (16, 2, (4, 100)), (16, 3, (4, 100)), (16, 2, (6, 30))],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_an_error_has_the_same_bits_wherever_it_is_made(lanes, folds, shape, shared, monkeypatch):
    _divide(monkeypatch, lanes, folds, pair_lanes=4)
    model_pred, target, ref_pred = predictions(shape, torch.bfloat16, shared=shared)
    whole = denoising_errors(model_pred, target, "triton"), denoising_errors(ref_pred, target, "triton")
    both = torch.cat([target, target]) if shared else target
    for rows, error in ((model_pred, whole[0]), (ref_pred, whole[1])):
        alone = [denoising_errors(rows[i : i + 1], both[i : i + 1], "triton") for i in range(len(rows))]
        assert torch.equal(torch.cat(alone), error)
    for ref in _references(ref_pred, target):
        for result, _ in _all_results(model_pred, target, ref):
            assert torch.equal(result.model_error, whole[0])
            assert torch.equal(result.ref_error, whole[1])


@pytest.mark.parametrize("size", [30, 150], ids=["one chunk", "chunks"])
def test_same_bits_twice_and_by_either_way(size, small):
    model_pred, target, ref_pred = predictions((6, size), torch.bfloat16)
    for ref in _references(ref_pred, target):
        runs = [x for _ in range(2) for x in _all_results(model_pred, target, ref)]
        for (first, grad), (second, again) in pairwise(runs):
            assert torch.equal(grad, again)
            assert all(torch.equal(x, y) for x, y in zip(_values(first), _values(second)))


@pytest.mark.parametrize("size", [20, 80], ids=["one chunk", "chunks"])
def test_programs_may_end_in_any_order(size, small, poisoned_memory, monkeypatch):
    model_pred, target, ref_pred = predictions((14, size))
    expected = _all_results(model_pred, target, {"ref_pred": ref_pred})
    original = interpreter_builder.set_grid_idx
    for step in (-1, 11):  # backwards; in steps of eleven modulo the number of programs, which visits all of them

        def elsewhere(x, y, z, step=step):
            programs = interpreter_builder.grid_dim[0]
            assert math.gcd(step, programs) == 1
            original(step * x % programs, y, z)

        with monkeypatch.context() as patched:
            patched.setattr(interpreter_builder, "set_grid_idx", elsewhere)
            found = _all_results(model_pred, target, {"ref_pred": ref_pred})
        for (first, grad), (second, again) in zip(expected, found):
            assert torch.equal(grad, again)
            assert all(torch.equal(x, y) for x, y in zip(_values(first), _values(second)))


def test_a_ticket_serves_launch_after_launch(small, monkeypatch):
    ticket = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(preference, "_ticket", lambda device, own: ticket)
    for shape in ((14, 31), (2, 100), (10, 40), (2, 1)):
        with launches() as made:
            _check(shape, shared=False)
            assert ticket.item() == 0
        counted = [launch for launch in made if launch.kernel == "_preference_fwd_kernel"]
        assert counted and all(launch.arguments["ticket_ptr"] is ticket for launch in counted)


def test_each_stream_has_a_ticket(monkeypatch):
    """Simulates two GPUs: their streams are numbers, and tensors for them are made on the CPU."""
    zeros, streams, capturing = torch.zeros, {0: 0, 1: 0}, False
    monkeypatch.setattr(preference, "_tickets", {})
    monkeypatch.setattr(torch, "zeros", lambda *sizes, dtype, device: zeros(*sizes, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", streams.__getitem__, raising=False)
    first, second, current = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda")
    made = [preference._ticket(device, own=False) for device in (first, second)]
    streams[0] = 0x5EED
    made.append(preference._ticket(first, own=False))
    assert len({id(ticket) for ticket in made}) == 3
    assert all(ticket.item() == 0 and ticket.dtype == torch.int32 for ticket in made)
    assert preference._ticket(first, own=False) is made[2]
    assert preference._ticket(current, own=False) is made[1]
    streams[0] = 0
    assert preference._ticket(first, own=False) is made[0]
    assert preference._ticket(first, own=True) is not made[0]
    capturing = True
    assert preference._ticket(first, own=False) is not made[0]
    assert list(preference._tickets) == [(0, 0), (1, 0), (0, 0x5EED)]


def test_kernel_and_twin_offer_the_same():
    model_pred, target, ref_pred = (x.detach() for x in predictions((6, 35)))
    weights = torch.tensor([0.5, 1.0, 2.0])
    for ref in ((ref_pred, None), (None, torch.full((6,), 0.2))):
        for learn_sign, more in ((-1.0, ()), (0.0, (2.0,)), (1.0, (0.5, 0.75)), (-1.0, (0.0, 0.0))):
            args = (model_pred, target, *ref, weights, eager.LossForm(20.0, learn_sign, 1e-3, *more))
            for ours, twin in zip(preference.preference(*args), eager.preference(*args), strict=True):
                torch.testing.assert_close(ours, twin, rtol=2e-6, atol=2e-6)
            for scale in (3.0, torch.tensor(3.0)):
                ours, twin = (kernels.loss_and_grad(*args, scale, None) for kernels in (preference, eager))
                torch.testing.assert_close((*ours[0], ours[1]), (*twin[0], twin[1]), rtol=2e-6, atol=2e-6)


def test_short_run_follows_the_torch_backend():
    generator = torch.Generator().manual_seed(0)
    noisy, target = torch.randn(8, 3, 6, 6, generator=generator), torch.randn(4, 3, 6, 6, generator=generator)
    weights, losses = {}, {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        policy, frozen = (torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        frozen.load_state_dict(policy.state_dict())
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-3)
        losses[backend] = []
        for step in range(6):
            with torch.no_grad():
                ref_error = denoising_errors(frozen(noisy), target, backend)
            options = {"ref_error": ref_error, "beta": 50.0, "backend": backend}
            optimizer.zero_grad()
            model_pred = policy(noisy)
            if step % 2:
                result = preference_loss(model_pred, target, **options)
                result.loss.backward()
            else:
                result, grad = loss_and_grad(model_pred, target, **options, overwrite=True)
                model_pred.backward(grad)
            optimizer.step()
            losses[backend].append(result.loss.item())
        weights[backend] = policy.weight.detach()
    assert losses["triton"][0] == losses["torch"][0]  # ln 2
    assert len({round(loss, 3) for loss in losses["torch"]}) > 3  # training does change the loss
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=2e-5, atol=0)
    torch.testing.assert_close(weights["triton"], weights["torch"], rtol=1e-5, atol=1e-6)
