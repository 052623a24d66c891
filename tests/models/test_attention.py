"""Attention backends: equal values in chunks, the choice between backends (with a fake xformers), values on a GPU."""

import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)
from peft import LoraConfig

import seppo_fast.models.attention as attention
from seppo_fast.models.attention import ChunkedAttention, attention_layers, choose_attention, set_attention
from seppo_fast.utils.errors import ConfigError
from tests.helpers.calls import call_of
from tests.helpers.tiny import tiny_unet

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LATENT, PROMPT, ROWS = (4, 8, 8), (7, 16), 3


@pytest.fixture
def unet():
    return tiny_unet(second_block="AttnDownBlock2D")


def softmax_attention(query, key, value, attn_bias=None, op=None, scale=None):
    """Computes what xformers computes on (rows x heads, tokens, head_dim), in float64."""
    scores = query.double() @ key.double().transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if attn_bias is None else scores + attn_bias.double()
    return (scores.softmax(-1) @ value.double()).to(query.dtype)


@pytest.fixture
def xformers(monkeypatch):
    """A fake xformers where the diffusers processor looks for it; tests replace its function."""
    ops = SimpleNamespace(memory_efficient_attention=softmax_attention)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    return ops


def forward_and_gradients(unet):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(ROWS, *LATENT, generator=generator, dtype=unet.dtype)
    embeds = torch.randn(ROWS, *PROMPT, generator=generator, dtype=unet.dtype)
    unet.zero_grad()
    output = unet(latents, torch.arange(ROWS), encoder_hidden_states=embeds).sample
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in unet.parameters() if p.grad is not None)]


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def layer(heads, cross, **kind):
    torch.manual_seed(0)
    return Attention(query_dim=12, cross_attention_dim=10 if cross else None, heads=heads, dim_head=4, **kind).double()


@pytest.mark.parametrize("processor", [AttnProcessor2_0, XFormersAttnProcessor])
@pytest.mark.parametrize("mask_rows", [0, 1, 3], ids=["no mask", "mask by row", "mask by head"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize(("rows", "limit"), [(7, 7), (7, 4), (8, 13), (5, 3), (1, 2)])
def test_chunks_give_the_same_values(xformers, processor, mask_rows, cross, rows, limit):
    heads = 3
    attn = layer(heads, cross)
    generator = torch.Generator().manual_seed(2)
    normal = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    hidden = normal(rows, 6, 12).requires_grad_()
    context = normal(rows, 5, 10).requires_grad_() if cross else None
    mask = normal(rows * mask_rows, 1, 5 if cross else 6) if mask_rows else None
    largest = []

    def counted(attn, hidden_states, *others, **kwargs):
        largest.append(len(hidden_states) * attn.heads)
        return processor()(attn, hidden_states, *others, **kwargs)

    def run(attend):
        output = attend(attn, hidden, encoder_hidden_states=context, attention_mask=mask)
        inputs = [x for x in (hidden, context, *attn.parameters()) if x is not None]
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    actual = run(ChunkedAttention(counted, limit))
    # A single row is never split, even if its heads exceed the limit.
    assert max(largest) < max(limit, heads + 1)
    assert sum(largest) == rows * heads
    assert len(largest) == -(-rows // max(1, (limit - 1) // heads))
    assert_close(actual, run(processor()), 1e-12)


def test_chunks_of_pictures_with_group_norm_and_residual():
    attn = layer(3, False, norm_num_groups=4, residual_connection=True)
    pictures = torch.randn(5, 12, 2, 3, dtype=torch.float64)
    expected = AttnProcessor2_0()(attn, pictures)
    assert expected.shape == pictures.shape
    assert_close([ChunkedAttention(AttnProcessor2_0(), 7)(attn, pictures)], [expected], 1e-12)


@pytest.mark.parametrize(("rows", "calls"), [(8191, [8191]), (8192, [8191, 1])])
def test_the_limit_is_65536_rows_times_heads(rows, calls):
    seen = []

    def processor(attn, hidden_states, *others):
        seen.append(len(hidden_states))
        return hidden_states

    hidden = torch.arange(rows)[:, None, None]
    assert torch.equal(ChunkedAttention(processor)(SimpleNamespace(heads=8), hidden), hidden)
    assert seen == calls


def test_other_arguments_arrive():
    seen = []

    def processor(attn, hidden_states, context, mask, temb, *args, **kwargs):
        seen.append((temb.tolist(), args, kwargs))
        return hidden_states

    attn, hidden = SimpleNamespace(heads=1), torch.zeros(3, 1, 1)
    for limit in (4, 3):
        ChunkedAttention(processor, limit)(attn, hidden, None, None, torch.arange(3), "more", word=1)
    assert seen == [
        ([0, 1, 2], ("more",), {"word": 1}),
        ([0, 1], ("more",), {"word": 1}),
        ([2], ("more",), {"word": 1}),
    ]


def with_lora(unet):
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("limit", [attention.GRID_LIMIT, 12], ids=["whole", "chunks"])
def test_both_backends_give_the_values_of_a_unet_left_alone(unet, xformers, monkeypatch, lora, limit):
    unet = (with_lora(unet) if lora else unet).double()
    expected = forward_and_gradients(unet)
    for backend in ("xformers", "sdpa"):
        plain = attention._PROCESSORS[backend]()
        monkeypatch.setattr(attention, "_processor", lambda _, plain=plain: ChunkedAttention(plain, limit))
        set_attention(unet, backend)
        assert {processor._processor for processor in unet.attn_processors.values()} == {plain}
        assert_close(forward_and_gradients(unet), expected, 1e-12)


def test_every_layer_gets_the_processor_of_its_backend(unet, xformers):
    for backend, kind in (("xformers", XFormersAttnProcessor), ("sdpa", AttnProcessor2_0)):
        set_attention(unet, backend)
        set_attention(unet, backend)  # twice does not wrap twice
        assert {type(processor._processor) for processor in unet.attn_processors.values()} == {kind}


def test_sdpa_in_one_chunk_changes_no_bit(unet):
    expected = forward_and_gradients(unet)
    set_attention(unet, "sdpa")
    assert all(torch.equal(a, b) for a, b in zip(forward_and_gradients(unet), expected))


def test_xformers_asks_for_its_package(unet, monkeypatch):
    monkeypatch.setattr(attention_processor, "xformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'seppo_fast\[xformers\]'"):
        set_attention(unet, "xformers")
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_other_attention_is_not_replaced(unet):
    next(module for module in unet.modules() if isinstance(module, Attention)).set_processor(AttnAddedKVProcessor())
    with pytest.raises(ValueError, match=r"unet: .*attn1.processor is a AttnAddedKVProcessor"):
        set_attention(unet, "sdpa")
    with pytest.raises(ValueError, match=r"backend: 'flash' is unknown"):
        set_attention(unet, "flash")


def choose(unet, wanted="auto", device=CUDA, dtype=torch.float32, **kwargs):
    """Calls `choose_attention` as on a GPU, although the UNet is on the CPU."""
    return choose_attention(wanted, unet, call=call_of(LATENT, PROMPT), rows=ROWS, device=device, dtype=dtype, **kwargs)


def no_timer(functions):
    raise AssertionError("nothing should be timed here")


def test_layers_are_found_with_their_shapes(unet):
    layers = attention_layers(with_lora(unet), call_of(LATENT, PROMPT), 5, torch.bfloat16)
    # One cross-attention block has one such layer, the other has two; the middle block's shapes differ.
    found = {(shape.hidden, shape.context, shape.heads, shape.head_dim): len(names) for shape, names in layers.items()}
    text = (5, 7, 16)
    assert found == {
        ((5, 64, 16), None, 2, 8): 3,
        ((5, 64, 16), text, 2, 8): 3,
        ((5, 16, 32), None, 2, 16): 1,
        ((5, 16, 32), text, 2, 16): 1,
        ((5, 32, 4, 4), None, 16, 2): 1,
    }
    names = [name for group in layers.values() for name in group]
    assert sorted(names) == sorted(name.removesuffix(".processor") for name in unet.attn_processors)
    self_attention = next(shape for shape in layers if shape.context is None)
    assert str(self_attention) == "5 rows, 64 queries, 64 keys, 2 heads of 8"


@pytest.mark.parametrize("wanted", ["auto", "sdpa"])
def test_the_cpu_takes_sdpa(unet, xformers, wanted):
    assert choose(unet, wanted, device=CPU, timer=no_timer) == "sdpa"


def test_sdpa_is_taken_as_it_is(unet, xformers):
    assert choose(unet, "sdpa", timer=no_timer) == "sdpa"


def test_without_xformers(unet, monkeypatch):
    monkeypatch.setattr(attention_processor, "xformers", None)
    assert choose(unet, "auto", timer=no_timer) == "sdpa"
    with pytest.raises(ConfigError, match=r"pip install 'seppo_fast\[xformers\]'"):
        choose(unet, "xformers", timer=no_timer)


def test_xformers_on_the_cpu_is_refused(unet, xformers):
    with pytest.raises(ConfigError, match="not on cpu"):
        choose(unet, "xformers", device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_the_faster_by_the_sum_over_all_layers(unet, xformers, dtype):
    """xformers is faster for the shapes that occur once, slower for the others."""
    counts = [len(names) for names in attention_layers(unet, call_of(LATENT, PROMPT), ROWS, dtype).values()]
    assert sorted(counts) == [1, 1, 1, 3, 3]

    def made_up(slower):
        # Milliseconds of SDPA and of xformers, shape by shape.
        times = iter([(1.0, 1.0 + slower) if count == 3 else (2.0, 1.0) for count in counts])
        return lambda functions: [(function(), time)[1] for function, time in zip(functions, next(times), strict=True)]

    # In total: SDPA 6 + 6, xformers 6 + 6 * slower + 3.
    assert choose(unet, dtype=dtype, timer=made_up(0.4)) == "xformers"
    assert choose(unet, dtype=dtype, timer=made_up(0.6)) == "sdpa"
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize(("forwards", "faster"), [(0, "sdpa"), (1.9, "sdpa"), (2.1, "xformers"), (50, "xformers")])
def test_sampling_weighs_as_much_as_it_is_called(unet, xformers, forwards, faster):
    """In this example xformers takes 2 ms more with a backward, and 1 ms less without."""
    graphs = []

    def timer(functions):
        graphs.append(len(functions[0]()) > 1)
        return [10.0, 12.0] if graphs[-1] else [5.0, 4.0]

    assert choose(unet, timer=timer, forwards=forwards) == faster
    assert graphs == ([True, False] * 5 if forwards else [True] * 5)


def test_what_is_timed_is_forward_and_backward_of_each_backend(unet, xformers):
    calls = []

    def seen(query, key, value, **others):
        query.register_hook(lambda gradient: calls.append("backward"))
        calls.append("forward")
        return softmax_attention(query, key, value, **others)

    xformers.memory_efficient_attention = seen

    def timer(functions):
        calls.clear()
        functions[0]()
        assert calls == []
        functions[1]()
        assert calls == ["forward", "backward"]
        return [1.0, 0.5]

    assert choose(unet, timer=timer) == "xformers"


def refuses_cross(query, key, value, **others):
    if key.shape[1] == PROMPT[0]:
        raise NotImplementedError("No operator found for\n  these inputs")
    return softmax_attention(query, key, value, **others)


def is_wrong(query, key, value, **others):
    return 1.02 * softmax_attention(query, key, value, **others)


def is_not_a_number(query, key, value, **others):
    return softmax_attention(query, key, value, **others) * float("nan")


def has_no_gradient_of_keys(query, key, value, **others):
    return softmax_attention(query, key.detach(), value, **others)


PROBLEMS = {
    refuses_cross: r"3 rows, 64 queries, 7 keys, 2 heads of 8.*NotImplementedError: No operator found for these inputs",
    is_wrong: "output and gradients are off by",
    is_not_a_number: "off by nan",
    has_no_gradient_of_keys: "output and gradients are off by",
}


@pytest.mark.parametrize("function", PROBLEMS, ids=lambda function: function.__name__)
def test_xformers_that_does_not_work(unet, xformers, function):
    xformers.memory_efficient_attention = function
    with pytest.warns(UserWarning, match=PROBLEMS[function] + ".*using sdpa instead"):
        assert choose(unet, timer=no_timer) == "sdpa"
    with pytest.raises(ConfigError, match=PROBLEMS[function] + ".*use sdpa or auto"):
        choose(unet, "xformers")


def test_xformers_that_works_is_taken_untimed_where_it_is_wanted(unet, xformers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(unet, "xformers", timer=no_timer) == "xformers"


def test_no_memory_is_not_held_against_xformers(unet, xformers):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    xformers.memory_efficient_attention = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        choose(unet)


SD15 = [(4096, 40), (1024, 80), (256, 160), (64, 160)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "tokens", "keys", "head_dim"),
    [(2, tokens, keys, head_dim) for tokens, head_dim in SD15 for keys in (None, 77)] + [(8193, 16, None, 40)],
)
def test_backends_on_a_gpu(backend, dtype, rows, tokens, keys, head_dim):
    """Compares with plain attention in float64. 8193 rows of 8 heads are more than a kernel supports at once."""
    if backend == "xformers" and attention_processor.xformers is None:
        pytest.skip("needs xformers")
    torch.manual_seed(0)
    attn = Attention(64, 64 if keys else None, heads=8, dim_head=head_dim).to(CUDA)
    hidden = torch.randn(rows, tokens, 64, device=CUDA)
    context = torch.randn(rows, keys, 64, device=CUDA) if keys else None
    gradient = torch.randn(rows, tokens, 64, device=CUDA)

    def run(processor, compute, rows):
        attn.to(torch.float64 if compute == torch.float64 else torch.float32)
        inputs = [x[rows].to(attn.to_q.weight.dtype).requires_grad_() for x in (hidden, context) if x is not None]
        half = compute in (torch.float16, torch.bfloat16)
        with torch.autocast("cuda", compute if half else torch.float16, enabled=half):
            output = processor(attn, *inputs)
        return [output, *torch.autograd.grad(output, inputs, gradient[rows].to(output.dtype))]

    some = [0, rows - 1]  # if there are two chunks, one row of each
    actual = run(attention._processor(backend), dtype, slice(None))
    expected = run(attention_processor.AttnProcessor(), torch.float64, some)
    for a, b in zip(actual, expected, strict=True):
        assert (a[some].double() - b).norm() / b.norm() <= attention._TOLERANCE[dtype]


@needs_gpu
def test_the_choice_on_a_gpu(unet):
    unet.to(CUDA)
    assert choose(unet, dtype=torch.bfloat16) in ("sdpa", "xformers")
    first, second = attention.interleaved_milliseconds(
        [lambda: torch.ones(2**10, device=CUDA).sum(), lambda: torch.ones(2**28, device=CUDA).sum()]
    )
    assert 0 < first < second
