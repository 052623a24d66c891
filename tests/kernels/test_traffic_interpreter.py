"""The memory traffic and launches of a call: the byte model of kernels/preference.py, counted element by element."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seppo_fast.kernels.denoising_error as errors
from seppo_fast.loss import denoising_errors, loss_and_grad, preference_loss
from tests.helpers.preference_reference import predictions
from tests.kernels.launches import launches
from tests.kernels.traffic import Traffic

FORWARD, BACKWARD, ERRORS = "_preference_fwd_kernel", "_errors_bwd_kernel", "_errors_fwd_kernel"
CHUNK = 64  # elements per chunk in these tests


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(errors.DIVISIONS, errors.DEFAULT, (16, CHUNK // 16))


# Latents moved per pair if the target is shared; if not, one more each time it is read.
MODEL = {
    ("at once", "one chunk"): {"ref_pred": 7, "ref_error": 5},
    ("at once", "chunks"): {"ref_pred": 10, "ref_error": 8},
    ("autograd", "one chunk"): {"ref_pred": 10, "ref_error": 8},
    ("autograd", "chunks"): {"ref_pred": 10, "ref_error": 8},
}


@pytest.mark.parametrize(("way", "division"), MODEL, ids=str)
@pytest.mark.parametrize("kind", ["ref_pred", "ref_error"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_each_byte_moves_as_often_as_the_byte_model_says(way, division, kind, shared):
    pairs, size = 3, (CHUNK - 3 if division == "one chunk" else 2 * CHUNK + 5)
    model_pred, target, ref_pred = predictions((2 * pairs, size), torch.bfloat16, shared=shared)
    ref = {kind: ref_pred if kind == "ref_pred" else torch.full((2 * pairs,), 0.2)}
    # The two options add no traffic. Half of the cases have them, for each way, division and kind.
    more = {"sft_weight": 4.0, "safeguard": 0.9} if shared == (kind == "ref_pred") else {}
    with Traffic().watched() as traffic, launches() as made:
        if way == "at once":
            _, grad = loss_and_grad(model_pred, target, **ref, **more, backend="triton")
        else:
            loss = preference_loss(model_pred, target, **ref, **more, backend="triton").loss
            (grad,) = torch.autograd.grad(loss, model_pred)

    alone = way == "at once" and division == "one chunk"
    assert [launch.kernel for launch in made] == [FORWARD] if alone else [FORWARD, BACKWARD]
    reads = {
        "pred": traffic.times(traffic.loaded, model_pred),
        "target": traffic.times(traffic.loaded, target),
        "ref_pred": traffic.times(traffic.loaded, ref_pred),
    }
    assert reads == {"pred": len(made), "target": len(made), "ref_pred": int(kind == "ref_pred")}
    assert traffic.times(traffic.stored, grad) == 1
    rows = 2 * reads["pred"] + (1 if shared else 2) * reads["target"] + 2 * reads["ref_pred"] + 2
    assert rows == MODEL[way, division][kind] + (0 if shared else len(made))


def test_overwriting_moves_no_more():
    model_pred, target, ref_pred = (x.detach() for x in predictions((6, CHUNK), torch.float16, shared=True))
    with Traffic().watched() as traffic:
        loss_and_grad(model_pred, target, ref_pred, overwrite=True, backend="triton")
    assert traffic.times(traffic.loaded, model_pred) == 1
    assert traffic.times(traffic.stored, model_pred) == 1


class _Operations(TorchDispatchMode):
    """Records the names of torch's operations, except those that the interpreter needs for a launch."""

    def __init__(self):
        super().__init__()
        self.names, self.launching = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.launching:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def around(self, run):
        """Makes a launch without recording its operations."""
        self.launching = True
        result = run()
        self.launching = False
        return result


# Operations that start nothing on a GPU.
ON_THE_HOST = {"empty", "empty_like", "new_empty", "detach", "view", "split", "split_with_sizes", "unbind", "slice"}


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 1], ids=["one chunk", "chunks"])
def test_nothing_but_kernels_is_launched(size):
    model_pred, target, ref_pred = predictions((4, size))
    through = preference_loss(model_pred, target, ref_pred, backend="triton").loss
    upstream, each = torch.tensor(0.5), torch.ones(4)
    over = {"grad_scale": upstream, "overwrite": True}
    at_once = [FORWARD] if size == CHUNK else [FORWARD, BACKWARD]
    calls = [
        ([FORWARD], lambda: preference_loss(model_pred, target, ref_pred, backend="triton")),
        ([BACKWARD], lambda: torch.autograd.grad(through, model_pred, upstream)),
        (at_once, lambda: loss_and_grad(model_pred, target, ref_pred, backend="triton")),
        (at_once, lambda: loss_and_grad(model_pred.detach(), target, ref_pred, **over, backend="triton")),
        ([ERRORS], lambda: denoising_errors(ref_pred, target, "triton")),
        (
            [ERRORS, BACKWARD],
            lambda: torch.autograd.grad(denoising_errors(model_pred, target, "triton"), model_pred, each),
        ),
    ]
    for expected, call in calls:
        with _Operations() as operations, launches(around=operations.around) as made:
            call()
        assert [launch.kernel for launch in made] == expected
        # Here a ticket is zeroed for each launch; on a GPU this happens once per stream.
        assert set(operations.names) - {"zeros"} <= ON_THE_HOST
        assert operations.names.count("zeros") == expected.count(FORWARD)
