"""Memory formats: reads and writes in place, and the gradient's layout. Runs on the same backends as test_loss.py."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seppo_fast.kernels.eager as eager
from seppo_fast.loss import loss_and_grad, preference_loss
from tests.helpers.preference_reference import PLACES, close, predictions, reference, relative_rms


def _plain(x):
    return x.contiguous()


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _frames_first(x):
    """Returns (B, C, F, H, W) as a view of memory in the order (B, F, C, H, W), as an AnimateDiff model returns it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _gaps(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def _transposed(x):
    return x.mT.contiguous().mT


def _first_channels(x):
    return torch.cat([x, x + 1], 1)[:, : x.shape[1]]


def _every_other_sample(x):
    return x.repeat_interleave(2, 0)[::2]


def _half_of_a_batch(x):
    return torch.cat([x, x + 1])[: len(x)]


def _samples_innermost(x):
    return x.permute(*range(1, x.ndim), 0).contiguous().permute(-1, *range(x.ndim - 1))


def _reversed(x):
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


IMAGE, VIDEO = (4, 3, 6, 5), (4, 4, 3, 6, 5)
SAME = {
    "channels_last": (IMAGE, _channels_last),
    "channels_last, one channel": ((4, 1, 6, 5), _channels_last),
    "channels_last_3d": (VIDEO, _channels_last),
    "video, frames first": (VIDEO, _frames_first),
    "transposed": ((4, 7, 5), _transposed),
    "half of a batch": ((4, 3, 5), _half_of_a_batch),
    "every other sample": ((4, 3, 5), _every_other_sample),
    "first channels": (IMAGE, _first_channels),
}
# Layouts of prediction and target. A target with up to three dims after adjacent dims are merged is read in place.
MIXED = {
    "channels_last, contiguous": (IMAGE, _channels_last, _plain),
    "contiguous, channels_last": (IMAGE, _plain, _channels_last),
    "channels_last_3d, contiguous": (VIDEO, _channels_last, _plain),
    "contiguous, channels_last_3d": (VIDEO, _plain, _channels_last),
    "video, frames first, contiguous": (VIDEO, _frames_first, _plain),
    "video, contiguous, frames first": (VIDEO, _plain, _frames_first),
    "video, frames first, channels_last_3d": (VIDEO, _frames_first, _channels_last),
    "contiguous, gaps": (IMAGE, _plain, _gaps),
    "channels_last, first channels": (IMAGE, _channels_last, _first_channels),
    "transposed, contiguous": ((4, 7, 5), _transposed, _plain),
    "contiguous, samples innermost": ((4, 7, 5), _plain, _samples_innermost),
    "contiguous, one number": (IMAGE, _plain, lambda x: torch.zeros((), device=x.device).expand(x.shape)),
    "channels_last, one image": (IMAGE, _channels_last, lambda x: x[:1].expand(x.shape)),
}


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    return request.param


@contextmanager
def _latents_read(backend):
    """Records the addresses of prediction, target and reference prediction for every kernel that reads all three."""
    seen = []
    if backend == "torch":

        def spied(original):
            def spy(*args):
                seen.append(tuple(x.data_ptr() for x in args[:3]))
                return original(*args)

            return spy

        with (
            mock.patch.object(eager, "preference", spied(eager.preference)),
            mock.patch.object(eager, "loss_and_grad", spied(eager.loss_and_grad)),
        ):
            yield seen
        return
    from tests.kernels.launches import launches

    with launches() as made:
        yield seen
    arguments = [launch.arguments for launch in made if launch.kernel == "_preference_fwd_kernel"]
    seen.extend(tuple(x[name].data_ptr() for name in ("pred_ptr", "target_ptr", "ref_pred_ptr")) for x in arguments)


def _three_gradients(inputs, backend):
    """Returns three gradients (through autograd, in new memory, over the prediction), the logit and addresses read."""
    model_pred = inputs[0].requires_grad_()
    with _latents_read(backend) as seen:
        result = preference_loss(*inputs, beta=50.0, backend=backend)
        _, apart = loss_and_grad(*inputs, beta=50.0, backend=backend)
    (through,) = torch.autograd.grad(result.loss, model_pred)
    with _latents_read(backend) as seen_overwriting:
        _, written = loss_and_grad(*inputs, beta=50.0, overwrite=True, backend=backend)
    return (through, apart, written), result.logit, {*seen, *seen_overwriting}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_dense_layouts_are_read_and_written_in_place(place, name, shared):
    backend, device = place
    shape, lay_out = SAME[name]
    inputs = [lay_out(x.detach()) for x in predictions(shape, shared=shared, device=device)]
    expected = reference(*inputs, beta=50.0)
    gradients, logit, seen = _three_gradients(inputs, backend)
    assert seen == {tuple(x.data_ptr() for x in inputs)}
    close(logit, expected.logit, rtol=2e-6, atol=1e-6)
    for grad in gradients:
        assert relative_rms(grad, expected.grad) < 1e-6
        # The order of a latent's elements in memory is kept; gaps between rows may disappear.
        assert _strides(grad) == _strides(inputs[0])
    assert gradients[2].data_ptr() == inputs[0].data_ptr()
    assert gradients[2].stride() == inputs[0].stride()


def _strides(x):
    return [stride for size, stride in zip(x.shape[1:], x.stride()[1:]) if size > 1]


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
def test_target_is_read_where_it_lies(place, name, shared):
    backend, device = place
    shape, lay_out, lay_out_target = MIXED[name]
    model_pred, target, ref_pred = (x.detach() for x in predictions(shape, shared=shared, device=device))
    inputs = [lay_out(model_pred), lay_out_target(target), lay_out(ref_pred)]
    expected = reference(*inputs, beta=50.0)
    gradients, logit, seen = _three_gradients(inputs, backend)
    assert seen == {tuple(x.data_ptr() for x in inputs)}
    close(logit, expected.logit, rtol=2e-6, atol=1e-6)
    assert all(relative_rms(grad, expected.grad) < 1e-6 for grad in gradients)


def test_whatever_is_not_read_in_place_gives_the_same_values(place):
    backend, device = place
    model_pred, target, ref_pred = (x.detach() for x in predictions((4, 3, 2, 6, 5), device=device))
    expected = reference(model_pred, target, ref_pred, beta=50.0)
    lay_outs = (_plain, _channels_last, _gaps, _reversed)
    for first, second in itertools.product(lay_outs, lay_outs):
        gradients, logit, _ = _three_gradients([first(model_pred.clone()), second(target), second(ref_pred)], backend)
        close(logit, expected.logit, rtol=2e-6, atol=1e-6)
        assert all(relative_rms(grad, expected.grad) < 1e-6 for grad in gradients)


def test_writing_back_leaves_what_lies_between(place):
    backend, device = place
    inputs = [x.detach() for x in predictions((4, 3, 6, 5), torch.float16, device=device)]
    _, expected = loss_and_grad(*inputs, beta=50.0, backend=backend)
    memory = torch.full((4, 6, 6, 10), 7.0, dtype=torch.float16, device=device)
    model_pred = memory[:, :3, :, ::2]
    model_pred.copy_(inputs[0])
    _, grad = loss_and_grad(model_pred, *inputs[1:], beta=50.0, overwrite=True, backend=backend)
    assert grad.data_ptr() == model_pred.data_ptr()
    assert grad.stride() == model_pred.stride()
    assert torch.equal(model_pred, expected)
    model_pred.fill_(7.0)
    assert (memory == 7.0).all()


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("at_once", [False, True])
def test_twin_rearranges_no_channels_last_input(at_once):
    inputs = [_channels_last(x.detach()) for x in predictions((4, 3, 6, 5))]
    leaf = inputs[0].requires_grad_()
    with _Operations() as operations:
        if at_once:
            _, grad = loss_and_grad(*inputs, backend="torch")
        else:
            (grad,) = torch.autograd.grad(preference_loss(*inputs, backend="torch").loss, leaf)
    assert "mul" in operations.names
    assert not {"clone", "copy_", "contiguous", "_reshape_copy"} & set(operations.names)
    assert grad.stride() == leaf.stride()
