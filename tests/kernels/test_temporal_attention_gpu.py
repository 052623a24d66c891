"""Temporal attention on a GPU: values at true sizes, more rows than PyTorch's kernels support, graphs, launches."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNetMotionModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from seppo_fast.models.temporal_attention import set_temporal_attention, temporal_attention
from tests.helpers.preference_reference import relative_rms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Positions and head width of AnimateDiff's four levels at 256 px; 8 heads.
LEVELS = [(1024, 40), (256, 80), (64, 160), (16, 160)]
# Relative RMS error of an output whose operands, weights and result are rounded to the dtype.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FORWARD, BACKWARD = "_temporal_fwd_kernel", "_temporal_bwd_kernel"


def _inputs(positions, width, dtype=torch.bfloat16, clips=2, frames=16, inside=False, seed=0):
    """Returns q, k, v and a gradient of the output, (B, F, P, H, D); with `inside`, frames are inside positions."""
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = (clips, positions, frames, 8, width) if inside else (clips, frames, positions, 8, width)
    made = [torch.randn(sizes, generator=generator, device="cuda").to(dtype) for _ in range(4)]
    return [x.transpose(1, 2) if inside else x for x in made]


def _results(q, k, v, grad_out):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = temporal_attention(*leaves, "triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def _expected(*inputs):
    """Computes the same in float64, by autograd through PyTorch's own attention."""
    q, k, v, grad_out = (x.double().permute(0, 2, 3, 1, 4).detach().requires_grad_() for x in inputs)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    results = out, *torch.autograd.grad(out, (q, k, v), grad_out)
    return [x.detach().permute(0, 3, 1, 2, 4).cpu() for x in results]


def _check(inputs):
    results = _results(*inputs)
    for ours, right in zip(results, _expected(*inputs), strict=True):
        assert relative_rms(ours.double(), right) < ROUNDING[inputs[0].dtype]
    return results


@pytest.mark.parametrize("inside", [False, True], ids=["B F P", "B P F"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("positions", "width"), LEVELS)
def test_values_gradients_layouts_and_repeats(positions, width, dtype, inside):
    inputs = _inputs(positions, width, dtype, inside=inside)
    results = _check(inputs)
    assert all(x.stride() == inputs[0].stride() for x in results)
    assert all(map(torch.equal, results, _results(*inputs)))


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("width", [8, 40, 160])
@pytest.mark.parametrize("frames", [1, 5, 24, 32])
def test_other_frames_and_odd_numbers_of_positions(frames, width, dtype):
    inputs = _inputs(37, width, dtype, clips=3, frames=frames)
    results = _results(*inputs)
    for number, (ours, right) in enumerate(zip(results, _expected(*inputs), strict=True)):
        if frames == 1 and number in (1, 2):
            assert not ours.any()  # the one frame has all the weight, so q and k get no gradient
        else:
            assert relative_rms(ours.double(), right) < ROUNDING[dtype]


def test_memory_behind_a_slice_is_neither_read_nor_written():
    around = [torch.full((2, 7, 5, 3, 8, 48), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    inputs = [x[:, 1:6, :, 1, :, :40] for x in around]
    for x in inputs:
        x.normal_()
    kept = [x.clone() for x in around]
    _check(inputs)
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(around, kept))


def test_more_rows_than_attention_kernels_take():
    clips, positions = 5, 4096  # x 8 heads: 163,840 rows of 16 frames
    inputs = _inputs(positions, 40, clips=clips)
    results = _results(*inputs)
    for rows in (slice(0, 1), slice(clips - 1, clips)):
        expected = _expected(*(x[rows, :, -64:] for x in inputs))
        for ours, right in zip(results, expected, strict=True):
            assert relative_rms(ours[rows, :, -64:].double(), right) < ROUNDING[torch.bfloat16]


def test_more_than_two_to_the_31_elements():
    clips, positions = 52, 8192
    if torch.cuda.mem_get_info()[0] < 12 * 2**31:
        pytest.skip("needs 24 GiB of GPU memory")
    memory = torch.empty(clips, 16, positions, 8, 40, device="cuda", dtype=torch.float16).normal_()
    assert memory.numel() > 2**31
    out = temporal_attention(memory, memory, memory, "triton")
    (right, *_) = _expected(*[memory[-1:, :, -8:]] * 4)
    assert relative_rms(out[-1:, :, -8:].double(), right) < ROUNDING[torch.float16]


def test_gpu_is_never_waited_for():
    inputs = _inputs(256, 80)
    for mode in ("default", "error"):  # the first pass loads the kernels, which synchronizes
        torch.cuda.set_sync_debug_mode(mode)
        try:
            _results(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_launches():
    inputs = _inputs(256, 80)
    _results(*inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _results(*inputs)
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    assert names == [FORWARD, BACKWARD]


def test_graph_replays_with_other_numbers():
    inputs = _inputs(256, 80)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _results(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _results(*inputs)
    for seed in (1, 2):
        for old, new in zip(inputs, _inputs(256, 80, seed=seed)):
            old.copy_(new)
        graph.replay()
        assert all(map(torch.equal, captured, _results(*inputs)))


def test_compiled_in_one_graph():
    torch._dynamo.reset()
    inputs = _inputs(64, 160)
    step = torch.compile(lambda q, k, v: temporal_attention(q, k, v) + 1, fullgraph=True)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = step(*leaves)
    grads = torch.autograd.grad(out, leaves, inputs[3])
    expected = _results(*inputs)
    assert torch.equal(out, expected[0] + 1) and all(map(torch.equal, grads, expected[1:]))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unet_predicts_as_that_of_diffusers(dtype):
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = UNetMotionModel(
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            cross_attention_dim=32,
            num_attention_heads=2,
            motion_num_attention_heads=2,
        ).eval()
        sample, embeds = torch.randn(2, 4, 16, 16, 16), torch.randn(32, 7, 32)
        timesteps = torch.tensor([10, 500])
    unet.to(memory_format=torch.channels_last)
    exact = copy.deepcopy(unet).double()(sample.double(), timesteps, embeds.double()).sample.detach().cpu()

    def far(backend):
        set_temporal_attention(unet, backend)
        unet.zero_grad()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = unet(sample, timesteps, embeds).sample
        out.float().square().mean().backward()
        assert all(x.grad.isfinite().all() for x in unet.parameters() if x.grad is not None)
        return relative_rms(out.double(), exact)

    assert far("triton") < 1.5 * far("sdpa") + 1e-6
