"""Temporal attention under the interpreter: values, gradients, layouts, bytes moved.

tests/loss/test_interpreter.py starts the process.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

import seppo_fast.kernels.eager as eager
import seppo_fast.kernels.temporal_attention as kernels
from seppo_fast.models.temporal_attention import set_temporal_attention, temporal_attention
from tests.helpers.preference_reference import relative_rms
from tests.kernels.launches import launches
from tests.kernels.traffic import Traffic

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative RMS error of an output: float32 arithmetic, then one rounding to the dtype.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FRAMES_OUTSIDE, FRAMES_INSIDE, FUSED, HEADS_OUTSIDE, EXPANDED = "B F P", "B P F", "fused", "heads outside", "expanded"


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Makes `torch.empty` return memory filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def many_items(monkeypatch):
    """Gives each program 16 items, which the interpreter computes in about the time of one."""
    division = kernels.division

    def divided(*sizes):
        heads, frames, width, _, padded, chunk = division(*sizes)["SIZES"]
        return division(*sizes) | {"SIZES": (heads, frames, width, 16, padded, chunk)}

    monkeypatch.setattr(kernels, "division", divided)


def _inputs(shape, dtype=torch.float32, layout=FRAMES_OUTSIDE, seed=0):
    """Returns q, k, v and a gradient of the output, (B, F, P, H, D); gaps in the layout hold NaN."""
    clips, frames, positions, heads, width = shape
    generator = torch.Generator().manual_seed(seed)

    def made(*sizes):
        return torch.randn(sizes, generator=generator).to(dtype)

    if layout == FRAMES_OUTSIDE:
        return [made(*shape) for _ in range(4)]
    if layout == FRAMES_INSIDE:  # as motion modules pass it to a processor
        return [made(clips * positions, frames, heads * width).view(clips, positions, frames, heads, width)
                .transpose(1, 2) for _ in range(4)]  # fmt: skip
    if layout == FUSED:
        memory = torch.full((clips, frames, positions, 5, heads * width), torch.nan, dtype=dtype)
        memory[..., :4, :] = made(clips, frames, positions, 4, heads * width)
        return [x.unflatten(-1, (heads, width)) for x in memory.unbind(3)[:4]]
    if layout == HEADS_OUTSIDE:
        return [made(heads, positions, clips, frames, width).permute(2, 3, 1, 0, 4) for _ in range(4)]
    assert layout == EXPANDED
    return [made(clips, frames, 1, heads, width).expand(shape), *[made(*shape) for _ in range(3)]]


def _results(q, k, v, grad_out, backend="triton"):
    """Returns the output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = temporal_attention(*leaves, backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def _expected(q, k, v, grad_out):
    """Computes the same in float64 by the formulas, without autograd."""
    q, k, v, grad_out = (x.double().permute(0, 2, 3, 1, 4) for x in (q, k, v, grad_out))
    scale = q.shape[-1] ** -0.5
    scores = (q @ k.mT * scale).exp()
    weights = scores / scores.sum(-1, keepdim=True)
    slopes = grad_out @ v.mT
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) * scale
    results = weights @ v, slopes @ k, slopes.mT @ q, weights.mT @ grad_out
    return [x.permute(0, 3, 1, 2, 4) for x in results]


def _check(inputs):
    dtype = inputs[0].dtype
    results, expected = _results(*inputs), _expected(*inputs)
    for ours, right in zip(results, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == right.shape
        if right.any():
            assert relative_rms(ours, right) < ROUNDING[dtype]
        else:  # with one frame, which has all the weight, the gradients of q and k are zero
            assert not ours.any()
    return results


@pytest.mark.parametrize("frames", [1, 5, 16, 24, 32])
@pytest.mark.parametrize("width", [8, 40, 80, 160])
def test_values_and_gradients(frames, width, many_items):
    _check(_inputs((2, frames, 3, 2, width)))


@pytest.mark.parametrize("layout", [FRAMES_OUTSIDE, FRAMES_INSIDE, FUSED, HEADS_OUTSIDE, EXPANDED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_are_read_in_place_and_kept(layout, dtype, many_items):
    inputs = _inputs((2, 6, 5, 3, 40), dtype, layout)
    results = _check(inputs)
    if layout not in (FUSED, EXPANDED):  # these have gaps or shared memory, which results do not
        assert all(ours.stride() == given.stride() for ours, given in zip(results, [inputs[0], *inputs[:3]]))


# A program has four, two or one items; the last program of these shapes is partly empty where it can be.
@pytest.mark.parametrize(
    "shape", [(1, 16, 1, 1, 40), (1, 16, 7, 1, 80), (1, 3, 3, 1, 160), (1, 17, 1, 3, 160)], ids=str
)
def test_odd_numbers_of_items(shape):
    _check(_inputs(shape, torch.float16))


def test_large_scores_do_not_overflow(many_items):
    q, k, v, grad_out = _inputs((1, 5, 2, 2, 40))
    results = _results(300 * q, 300 * k, v, grad_out)
    assert all(x.isfinite().all() for x in results)
    weights = torch.einsum("bfphd,bgphd->bphfg", q, k).argmax(-1)  # one frame gets all the weight
    best = v.permute(0, 2, 3, 1, 4).gather(3, weights[..., None].expand(-1, -1, -1, -1, 40)).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(results[0], best)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_stays_in_its_head(place, many_items):
    inputs = _inputs((1, 5, 3, 4, 40))
    clean = _results(*inputs)
    inputs[place][0, 2, 1, 1, 7] = torch.nan
    for ours, before in zip(_results(*inputs), clean):
        differs = ours != before
        differs[:, :, 1, 1] = False
        assert not differs.any()
    assert any(x[:, :, 1, 1].isnan().any() for x in _results(*inputs))


def test_a_gradient_of_a_sum(many_items):
    q, k, v, grad_out = _inputs((2, 5, 3, 2, 40))
    leaf = v.requires_grad_()
    temporal_attention(q, k, leaf, "triton").sum().backward()
    assert relative_rms(leaf.grad, _expected(q, k, v.detach(), torch.ones_like(grad_out))[3]) < 1e-6


@pytest.mark.parametrize("layout", [FRAMES_OUTSIDE, FRAMES_INSIDE])
def test_same_bits_twice_and_in_any_batch(layout):
    inputs = _inputs((2, 16, 3, 3, 24), torch.bfloat16, layout)
    whole, again = _results(*inputs), _results(*inputs)
    assert all(map(torch.equal, whole, again))
    for position in (0, 2):
        part = _results(*(x[1:, :, position : position + 1] for x in inputs))
        assert all(torch.equal(x, y[1:, :, position : position + 1]) for x, y in zip(part, whole))


@pytest.mark.parametrize("layout", [FRAMES_OUTSIDE, FRAMES_INSIDE])
@pytest.mark.parametrize("frames", [5, 16, 32])
def test_each_byte_moves_once_in_one_launch_each(layout, frames, many_items):
    """Checks the byte model of kernels/temporal_attention.py."""
    q, k, v, grad_out = _inputs((2, frames, 3, 3, 40), torch.bfloat16, layout)
    for call, reads in ((lambda: [kernels.forward(q, k, v)], (q, k, v)),
                        (lambda: kernels.backward(q, k, v, grad_out), (q, k, v, grad_out))):  # fmt: skip
        with Traffic().watched() as traffic, launches() as made:
            written = call()
        assert len(made) == 1
        assert [traffic.times(traffic.loaded, x) for x in reads] == [1] * len(reads)
        assert [traffic.times(traffic.stored, x) for x in written] == [1] * len(written)
        moved = sum(map(torch.numel, reads)), sum(map(torch.numel, written))
        assert (sum(x.size for x in traffic.loaded), sum(x.size for x in traffic.stored)) == moved


def test_compiled_step_calls_the_kernels(many_items):
    torch._dynamo.reset()
    inputs = _inputs((2, 5, 3, 2, 40))
    eager_results = _results(*inputs)
    step = torch.compile(lambda q, k, v: temporal_attention(2 * q, k, v, "triton"), fullgraph=True, backend="aot_eager")
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    with launches() as made:
        out = step(leaves[0], leaves[1], leaves[2])
        grads = torch.autograd.grad(out, leaves, inputs[3])
    assert [x.kernel for x in made] == ["_temporal_fwd_kernel", "_temporal_bwd_kernel"]
    expected = _results(2 * inputs[0], *inputs[1:])
    assert torch.equal(out, expected[0]) and torch.equal(grads[0], 2 * expected[1])
    assert all(map(torch.equal, grads[1:], expected[2:])) and not torch.equal(out, eager_results[0])


def test_operators_are_what_they_say(many_items):
    leaves = [x.requires_grad_() for x in _inputs((1, 5, 2, 2, 8), layout=FRAMES_INSIDE)[:3]]
    torch.library.opcheck(kernels._operator, tuple(leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_twin_agrees(dtype, many_items):
    inputs = _inputs((2, 16, 3, 2, 40), dtype)
    for ours, twin in zip(_results(*inputs), _results(*inputs, backend="torch"), strict=True):
        assert relative_rms(ours, twin) < 2 * ROUNDING[dtype]
    assert torch.equal(_results(*inputs, backend="torch")[0], eager.temporal_attention(*inputs[:3]))


def test_motion_module_is_that_of_diffusers(many_items):
    torch.manual_seed(0)
    module = AnimateDiffTransformer3D(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        norm_num_groups=4,
        positional_embeddings="sinusoidal",
        num_positional_embeddings=8,
    )
    features = torch.randn(2 * 5, 16, 3, 5).to(memory_format=torch.channels_last).requires_grad_()

    def results():
        out = module(features, num_frames=5)
        return [out, *torch.autograd.grad(out.square().sum(), [features, *module.parameters()])]

    expected = results()
    set_temporal_attention(module, "triton")
    with launches() as made:
        ours = results()
    assert [x.kernel for x in made] == ["_temporal_fwd_kernel"] * 2 + ["_temporal_bwd_kernel"] * 2
    assert all(relative_rms(a, b.detach().double()) < 1e-4 for a, b in zip(ours, expected, strict=True))
