"""Attention over frames without a GPU: argument checks, and motion modules without transposes, by the PyTorch twin."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

import benchmarks.suites.temporal as benchmark
import seppo_fast.models.temporal_attention as temporal
from benchmarks.harness.cases import run_cases
from benchmarks.harness.measure import Machine
from seppo_fast.kernels.eager import temporal_attention as twin
from seppo_fast.models.attention import ChunkedAttention
from seppo_fast.models.temporal_attention import FrameAttention, set_temporal_attention, temporal_attention
from seppo_fast.models.unet import UNetFamily
from seppo_fast.utils.errors import ConfigError

OURS = (benchmark.THEIR_LAYOUT, benchmark.IN_PLACE)
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def _unet(lora=False):
    torch.manual_seed(0)
    unet = UNetMotionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=8,
    ).eval()
    if lora:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False))
    return unet.to(memory_format=torch.channels_last)


def _inputs(clips=2, frames=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(clips, 4, frames, 8, 8, generator=generator, dtype=dtype)
    embeds = torch.randn(clips * frames, 7, 16, generator=generator, dtype=dtype)
    return sample, torch.arange(100, 100 + clips), embeds


def _results(unet, inputs):
    """Returns the prediction and the gradients of the input and of all trained weights."""
    unet.zero_grad()
    sample = inputs[0].clone().requires_grad_()
    out = unet(sample, *inputs[1:]).sample
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weight).sum().backward()
    return [out.detach(), sample.grad, *(x.grad for x in unet.parameters() if x.requires_grad)]


def _far(ours, expected):
    """Returns the largest distance, relative to the tensor's norm, or to a thousandth of the largest norm if greater.

    The latter is for one frame, where the gradients of q and k are zero up to rounding.
    """
    least = 1e-3 * max(b.norm() for b in expected)
    return max(((a - b).norm() / max(b.norm(), least)).item() for a, b in zip(ours, expected, strict=True))


@pytest.fixture
def in_float64(monkeypatch):
    """Removes the dtype check: in float64, another order of sums differs by about 1e-14, and mistakes by more."""
    monkeypatch.setattr(temporal, "temporal_attention", lambda q, k, v, backend: twin(q, k, v))


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize(("clips", "frames"), [(3, 1), (1, 7), (2, 5)])
def test_unet_is_that_of_diffusers(clips, frames, lora, in_float64):
    unet, inputs = _unet(lora).double(), _inputs(clips, frames, torch.float64)
    expected = _results(unet, inputs)
    set_temporal_attention(unet, "torch")
    ours = _results(unet, inputs)
    assert len(ours) > 40
    assert _far(ours, expected) < 1e-12
    assert all(isinstance(x, temporal._InPlaceMotionModule) for x in _motion_modules(unet))


def _motion_modules(unet):
    return [x for x in unet.modules() if isinstance(x, AnimateDiffTransformer3D)]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_float32_differs_by_rounding_alone(lora):
    unet, inputs = _unet(lora), _inputs()
    expected = _results(unet, inputs)
    set_temporal_attention(unet, "torch")
    assert _far(_results(unet, inputs), expected) < 1e-4
    set_temporal_attention(unet, "sdpa")
    assert all(map(torch.equal, _results(unet, inputs), expected))
    assert {type(x) for x in _motion_modules(unet)} == {AnimateDiffTransformer3D}
    assert {type(x) for name, x in unet.attn_processors.items() if "motion" in name} == {ChunkedAttention}


def test_autocast(in_float64):
    unet, inputs = _unet(lora=True), _inputs()
    exact = _results(copy.deepcopy(unet), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = _results(unet, inputs)
        set_temporal_attention(unet, "torch")
        ours = _results(unet, inputs)
    assert ours[0].dtype == expected[0].dtype
    assert 1e-3 < _far(expected[:1], exact[:1]) < 0.1
    assert _far(ours[:1], exact[:1]) < 1.5 * _far(expected[:1], exact[:1])


@pytest.mark.parametrize("first", ["checkpointing", "attention"])
def test_checkpointing(first, in_float64):
    unet, inputs = _unet(lora=True).double(), _inputs(dtype=torch.float64)
    expected = _results(unet, inputs)
    steps = [lambda: UNetFamily.recompute(unet), lambda: set_temporal_attention(unet, "torch")]
    for step in steps if first == "checkpointing" else steps[::-1]:
        step()
    calls = []
    for module in _motion_modules(unet):
        module.norm.register_forward_hook(lambda *_: calls.append(1))
    copied = copy.deepcopy(unet)
    assert _far(_results(unet, inputs), expected) < 1e-12
    assert len(calls) == 2 * len(_motion_modules(unet))  # each runs once more in the backward
    for module in _motion_modules(copied):
        torch.nn.init.zeros_(module.proj_out.weight)
    assert _far(_results(copied, inputs)[:1], expected[:1]) > 1e-3  # the copy runs with its own weights
    set_temporal_attention(unet, "sdpa")
    del calls[:]
    assert all(map(torch.equal, _results(unet, inputs), expected))
    assert len(calls) == 2 * len(_motion_modules(unet))


def test_blocks_compile_whole():
    torch._dynamo.reset()
    unet = _unet(lora=True)
    set_temporal_attention(unet, "torch")
    block, tokens = _motion_modules(unet)[0].transformer_blocks[0], torch.randn(2, 5, 6, 16)
    expected = block(tokens)
    block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(block(tokens), expected)
    torch._dynamo.reset()


class _Copies(TorchDispatchMode):
    """Counts elements that are copied, or divided by a number."""

    def __init__(self):
        super().__init__()
        self.copied = self.divided = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.copied += result.numel()
        if function is torch.ops.aten.div.Tensor:
            self.divided += result.numel()
        return result


def test_no_permuted_copy_is_made(monkeypatch):
    """Checks the counts in the docstring of `models.temporal_attention`: two transposes and two divisions."""
    monkeypatch.setattr(temporal, "temporal_attention", lambda q, k, v, backend: q)
    unet = _unet()
    module = _motion_modules(unet)[0]
    features = torch.randn(2 * 5, 16, 8, 8).to(memory_format=torch.channels_last)
    for backend, turns, divisions in (("sdpa", 2, 2), ("torch", 0, 0)):
        set_temporal_attention(unet, backend)
        with torch.no_grad(), _Copies() as copies:
            out = module(features, num_frames=5)
        assert (copies.copied, copies.divided) == (turns * features.numel(), divisions * features.numel())
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_other_processors_bring_the_layout_of_diffusers_back():
    unet, inputs = _unet(), _inputs()
    expected = _results(unet, inputs)
    set_temporal_attention(unet, "torch")
    unet.set_attn_processor(AttnProcessor2_0())
    assert all(map(torch.equal, _results(unet, inputs), expected))


def test_processor_alone_and_a_feed_forward_in_pieces(in_float64):
    unet, inputs = _unet().double(), _inputs(dtype=torch.float64)
    expected = _results(unet, inputs)
    set_temporal_attention(unet, "torch")
    for module in _motion_modules(unet):
        module.transformer_blocks[0].set_chunk_feed_forward(1, 1)
    assert _far(_results(unet, inputs), expected) < 1e-12
    unet = _unet().double()
    processors = {name: FrameAttention("torch") if "motion" in name else x for name, x in unet.attn_processors.items()}
    unet.set_attn_processor(processors)
    assert _far(_results(unet, inputs), expected) < 1e-12


def test_weights_keep_their_names_and_contiguous_features_do_as_well(in_float64):
    unet, inputs = _unet().to(memory_format=torch.contiguous_format).double(), _inputs(dtype=torch.float64)
    expected, names = _results(unet, inputs), list(unet.state_dict())
    set_temporal_attention(unet, "torch")
    assert _far(_results(unet, inputs), expected) < 1e-12
    assert list(unet.state_dict()) == names


def test_frames_beyond_the_positional_embedding_are_refused():
    unet = _unet()
    set_temporal_attention(unet, "torch")
    with pytest.raises((ValueError, RuntimeError)):
        unet(*_inputs(1, 33))


def test_what_cannot_be_set():
    unet = _unet()
    with pytest.raises(ConfigError, match="temporal_attention = triton needs CUDA and triton; use sdpa"):
        set_temporal_attention(unet, "triton")
    assert all(type(x) is AnimateDiffTransformer3D for x in _motion_modules(unet))
    with pytest.raises(ValueError, match="backend: 'flash' is unknown, use one of sdpa, triton, torch"):
        set_temporal_attention(unet, "flash")
    image = UNet2DConditionModel(
        block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8
    )
    with pytest.raises(ValueError, match="unet: it has no motion modules"):
        set_temporal_attention(image, "torch")
    unet.mid_block.motion_modules[0].transformer_blocks[0].attn2.residual_connection = True
    with pytest.raises(ValueError, match="mid_block.motion_modules.0 is not built as in AnimateDiff"):
        set_temporal_attention(unet, "torch")
    unet = _unet()
    unet.mid_block.motion_modules[0].forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="the forward of mid_block.motion_modules.0 was replaced"):
        set_temporal_attention(unet, "torch")
    assert {type(x) for x in _motion_modules(unet)} == {AnimateDiffTransformer3D}


def test_processor_takes_no_context_and_no_mask():
    unet = _unet()
    set_temporal_attention(unet, "torch")
    attn, tokens = _motion_modules(unet)[0].transformer_blocks[0].attn1, torch.randn(2, 3, 4, 16)
    for name in ("encoder_hidden_states", "attention_mask"):
        with pytest.raises(ValueError, match=name):
            attn(tokens, **{name: tokens})


def _qkv(shape=(2, 5, 3, 2, 8), **options):
    return [torch.randn(shape, **options) for _ in range(3)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v: ([1], k, v), "q: expected a dense torch tensor, got list"),
        (lambda q, k, v: (q[0], k, v), r"q: .*non-empty tensor \(B, F, P, H, D\), got shape \(5, 3, 2, 8\)"),
        (lambda q, k, v: (q[:0], k[:0], v[:0]), "q: expected a non-empty tensor"),
        (lambda q, k, v: (q.double(), k, v), "q: expected dtype float32, bfloat16 or float16, got torch.float64"),
        (lambda q, k, v: _qkv((1, 33, 1, 1, 8)), "q: at most 32 frames .* got 33 frames and a head width of 8"),
        (lambda q, k, v: _qkv((1, 2, 1, 1, 161)), "q: at most .* got 2 frames and a head width of 161"),
        (lambda q, k, v: (q, k[:, :4], v), r"k: expected \(2, 5, 3, 2, 8\) torch.float32 on cpu, like q, got \(2, 4"),
        (lambda q, k, v: (q, k, v.half()), "v: .* got .* torch.float16"),
        (lambda q, k, v: (q, k, v.mT.contiguous().mT), "v: the last dim must have stride 1, got strides"),
    ],
)  # fmt: skip
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        temporal_attention(*wrong(*_qkv()))


def test_backends():
    q, k, v = _qkv()
    assert torch.equal(temporal_attention(q, k, v), temporal_attention(q, k, v, "torch"))
    with pytest.raises(ValueError, match="backend: 'cuda' is unknown"):
        temporal_attention(q, k, v, "cuda")
    with pytest.raises(ValueError, match="backend: 'triton' needs"):
        temporal_attention(q, k, v, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twin_is_attention(dtype):
    q, k, v = _qkv((2, 5, 3, 2, 40), dtype=dtype)
    rows = [x.double().permute(0, 2, 3, 1, 4) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*rows).permute(0, 3, 1, 2, 4)
    out = temporal_attention(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_benchmark_checks_values_first(monkeypatch, capsys):
    machine = Machine(torch.device("cpu"), quick=True)
    size = replace(benchmark.SIZES["quick"], rounds=1, seconds=1e-9)
    monkeypatch.setitem(benchmark.SIZES, "quick", size)
    right = run_cases(benchmark.cases(machine)).rows
    assert [row.provider for row in right] == ["copy", *[benchmark.SDPA, *OURS] * 2]
    assert all(row.suite == "video" and row.value_ok and row.ratio for row in right)
    monkeypatch.setattr(benchmark, "temporal_attention", lambda q, k, v, backend: 1.5 * temporal_attention(q, k, v))
    monkeypatch.setitem(benchmark.SIZES, "quick", replace(size, cases=size.cases[:1]))
    wrong = run_cases(benchmark.cases(machine)).rows
    assert [row.value_ok for row in wrong] == [True, True, False, False]
    assert all(bool(row.ratio) == row.value_ok for row in wrong)
    what = "attention, 1 pair, 16 frames x 16 positions, 8 heads of 40, forward + backward"
    assert f"{what}, {benchmark.IN_PLACE}: values differ" in capsys.readouterr().out


def test_benchmark_has_the_true_sizes():
    cases = benchmark.SIZES["gpu"].cases
    assert len(set(map(str, cases))) == len(set(cases))
    assert {case.shape for case in cases if case.pairs == 4} == {
        (8, 16, positions, 8, width)
        for positions, width in ((1024, 40), (256, 80), (64, 160), (16, 160), (4096, 40), (1024, 80), (256, 160))
    }
