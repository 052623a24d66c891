"""The layout of tensors in a slab, and their dtypes."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from seppo_fast.references.layout import PackedLayout, trainable_state_dict
from tests.helpers.pools import KEPT, Odd, bits, scrambled

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def slab_of(layout):
    return torch.full((layout.size,), 0xA5, dtype=torch.uint8)


def test_every_kind_of_tensor_lies_in_the_slab_bit_for_bit():
    module = Odd()
    expected, layout = scrambled(module, 0), PackedLayout.of(module)
    slab = slab_of(layout)
    layout.fill(slab, trainable_state_dict(module))
    views = layout.views(slab)
    assert tuple(views) == KEPT
    for name, view in views.items():
        assert bits(view) == bits(expected[name]), name
        assert view.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr(), name


def test_places_are_aligned_apart_and_as_tight_as_alignment_allows():
    layout = PackedLayout.of(Odd())
    end = 0
    for slot, view in zip(layout.slots, layout.views(slab_of(layout)).values(), strict=True):
        assert slot.offset == -(-end // 512) * 512, slot.name
        end = slot.offset + view.nbytes
    assert layout.size == -(-end // 512) * 512
    assert layout.payload == sum(tensor.nbytes for tensor in trainable_state_dict(Odd()).values())


def test_values_are_rounded_before_they_are_copied():
    """A copy from a GPU to another dtype goes through pageable memory and is converted on the CPU."""
    module = nn.Conv2d(3, 5, 3)
    layout = PackedLayout.of(module, BF16)
    slab, copied = slab_of(layout), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.copy_.default:
                copied.append((args[0].dtype, args[1].dtype))
            return func(*args, **(kwargs or {}))

    with Watch():
        layout.fill(slab, trainable_state_dict(module))
    assert copied == [(BF16, BF16)] * 2
    assert bits(layout.views(slab)["weight"]) == bits(module.weight.to(BF16))


def test_dense_tensors_keep_their_layout_and_others_become_dense():
    module = Odd()
    module.wide = nn.Parameter(torch.zeros(1, 3).expand(4, 3))
    views = PackedLayout.of(module).views(slab_of(PackedLayout.of(module)))
    for name in ("conv.weight", "transposed", "complex", "scalar"):
        assert views[name].stride() == module.get_parameter(name).stride(), name
    assert views["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    assert views["gappy"].is_contiguous() and views["wide"].is_contiguous()


def test_the_state_is_live_and_what_is_frozen_or_not_saved_is_not_in_it():
    module = Odd()
    state = trainable_state_dict(module)
    assert tuple(state) == KEPT
    assert state["embedding.weight"] is module.head.weight
    assert state["norm.running_mean"] is module.norm.running_mean


# float32's largest finite value, beyond float16's range, halfway cases to even, subnormal in each, minus zero, NaN.
VALUES = [3.4028235e38, -65520.0, 65519.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1e-7, 1e-40, -0.0, float("nan"), 1.1]


@pytest.mark.parametrize("compute", [FP16, BF16])
def test_weights_are_rounded_as_autocast_rounds_them(compute):
    module = nn.Linear(len(VALUES), 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([VALUES]))
    layout = PackedLayout.of(module, compute)
    slab = slab_of(layout)
    layout.fill(slab, trainable_state_dict(module))
    assert bits(layout.views(slab)["weight"]) == bits(module.weight.to(compute))
    # A one-hot row times the weights is one of the weights, as autocast's product sees it.
    row = torch.zeros(1, len(VALUES))
    row[0, -1] = 1
    with torch.autocast("cpu", compute), torch.no_grad():
        module.weight[0, :-1] = 0
        assert nn.functional.linear(row, module.weight).item() == layout.views(slab)["weight"][0, -1].item()


class Reads(nn.Linear):
    """A layer that also uses its weight outside the product."""

    def forward(self, x):
        return super().forward(x) * self.weight.sum()


def mixed_module():
    layers = [nn.Linear(3, 3), nn.Conv1d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv3d(3, 3, 1)]
    layers += [nn.ConvTranspose1d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1), nn.ConvTranspose3d(3, 3, 1)]
    kept = [nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.BatchNorm1d(3), nn.Embedding(3, 3), nn.PReLU(), Reads(3, 3)]
    kept += [nn.Bilinear(3, 3, 3), nn.MultiheadAttention(3, 1), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))]
    return nn.ModuleDict({"cast": nn.ModuleList(layers), "kept": nn.ModuleList(kept)})


def dtypes_of(module, compute):
    return {slot.name: getattr(torch, slot.dtype) for slot in PackedLayout.of(module, compute).slots}


@pytest.mark.parametrize("compute", [FP16, BF16])
def test_only_what_autocast_casts_is_kept_in_half_precision(compute):
    for name, dtype in dtypes_of(mixed_module(), compute).items():
        whole = torch.int64 if name.endswith("num_batches_tracked") else FP32
        assert dtype == (compute if name.startswith("cast") else whole), name


def test_float32_keeps_everything_as_it_is():
    expected = {name: tensor.dtype for name, tensor in trainable_state_dict(Odd()).items()}
    assert dtypes_of(Odd(), FP32) == expected
    # Weights tied to an embedding, of another dtype or outside a layer stay as they are.
    assert dtypes_of(Odd(), BF16) == expected | dict.fromkeys(("head.bias", "conv.weight", "conv.bias"), BF16)
    wide = nn.Linear(3, 3, dtype=torch.float64)
    assert dtypes_of(wide, FP16) == {"weight": torch.float64, "bias": torch.float64}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_from_others_keeps_them_as_they_are():
    tied, normed = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), nn.utils.weight_norm(nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert dtypes_of(tied, BF16) == {"0.weight": BF16, "0.bias": BF16, "1.bias": BF16}
    assert dtypes_of(normed, BF16) == {"bias": BF16, "weight_g": FP32, "weight_v": FP32}


@pytest.mark.parametrize("compute", [FP32, BF16])
def test_a_slab_of_sd15_is_its_payload_and_next_to_nothing_more(compute):
    """The host bytes are at most 1.02 times the payload, for full weights and for LoRA."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest is SD-1.5's by default
        full = PackedLayout.of(unet, compute)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        lora = PackedLayout.of(unet, compute)
    width, parameters = compute.itemsize, 859_520_964
    assert full.size <= 1.0001 * full.payload
    assert lora.size <= 1.02 * lora.payload
    assert parameters * width <= full.payload <= parameters * width * 1.001  # norms are a thousandth of it
    assert lora.payload == 1_594_368 * width


def test_a_table_survives_json():
    layout = PackedLayout.of(Odd(), BF16)
    assert PackedLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


CRAFTED = [
    ("size", -1), ("size", 255), ("size", 2**63), ("size", 1e9), ("size", float("inf")), ("size", None),
    ("entries", 3), ("entries", [3]), ("entries", [{}]), ("offset", -128), ("offset", 130), ("offset", 256),
    ("offset", 0), ("offset", 2**64), ("offset", 1.5), ("offset", float("nan")), ("shape", 4), ("shape", "4"),
    ("shape", [2**62]), ("shape", [2**40, 2**40]), ("shape", [-4]), ("shape", [-2, -2]),
    ("shape", [2, 2]), ("shape", [[4]]), ("stride", [-1]), ("stride", [0]), ("stride", [2]), ("stride", [2**61]),
    ("stride", [1, 1]), ("dtype", "float99"), ("dtype", "Tensor"), ("dtype", "__class__"), ("dtype", "float64"),
    ("dtype", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CRAFTED)
def test_a_table_that_is_none_is_refused(key, value):
    first = {"name": "a", "shape": [4], "stride": [1], "dtype": "float32", "offset": 0}
    tree = {"size": 256, "entries": [first, {**first, "name": "b", "shape": [32], "offset": 128}]}
    PackedLayout.from_json(copy.deepcopy(tree))
    if key in tree:
        tree[key] = value
    else:
        tree["entries"][1][key] = value
    with pytest.raises((ValueError, KeyError, TypeError)):
        PackedLayout.from_json(tree)


def test_a_module_that_does_not_match_is_described():
    layout, module = PackedLayout.of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))), nn.Sequential(nn.Linear(3, 5))
    module.register_buffer("more", torch.zeros(2))
    with pytest.raises(ValueError, match="module: ") as raised:
        layout.check(module)
    for line in (
        "0.weight: (4, 3) in the pool, (5, 3) in the module", "0.bias: (4,) in the pool, (5,) in the module",
        "1.weight: (2, 4) is not in the module", "1.bias: (2,) is not in the module", "more: (2,) is not in the pool",
    ):  # fmt: skip
        assert line in str(raised.value)
    layout.check(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))


def test_ten_lines_describe_a_module_that_differs_in_many():
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    with pytest.raises(ValueError, match="and 30 more") as raised:
        PackedLayout.of(many).check(nn.Linear(2, 2).requires_grad_(False))
    assert len(str(raised.value).splitlines()) == 12
