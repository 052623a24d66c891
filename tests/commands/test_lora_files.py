"""LoRA files: scale, rank and key names, as diffusers and ComfyUI read them."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from seppo_fast.commands.export import COMFYUI_FILE
from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.models.trainable import lora_weights, make_trainable, trainable
from seppo_fast.models.unet import UNetFamily

RANKS = (4, 16)
FORMATS = ("lora", "comfyui")


@pytest.fixture(scope="module")
def loras(tiny, tmp_path_factory):
    """By rank: a folder with a LoRA in both formats, its weights, and what it adds, (alpha / r) B A in float64."""
    made = {}
    for rank in RANKS:
        family = StableDiffusion.load(str(tiny), torch.device("cpu"))
        model = ModelConfig(train="lora", lora_rank=rank, precision="fp32")
        make_trainable(family.model, model, seed=rank, family=UNetFamily)
        generator = torch.Generator().manual_seed(rank)
        for name, weight in trainable(family.model).items():
            if "lora_B" in name:  # initialized to zero
                weight.data.normal_(generator=generator)
        weights = {name: tensor.detach() for name, tensor in lora_weights(family.model).items()}
        folder = tmp_path_factory.mktemp(f"rank{rank}")
        family.save_lora(folder, weights)
        named, metadata = family.comfyui_lora(weights, rank)
        save_file(
            {name: tensor.contiguous() for name, tensor in named.items()}, folder / COMFYUI_FILE, metadata=metadata
        )
        places = {name.partition(".lora_")[0] for name in weights}
        products = {
            place: weights[f"{place}.lora_B.weight"].double() @ weights[f"{place}.lora_A.weight"].double()
            for place in places
        }
        made[rank] = (folder, weights, products)  # alpha equals the rank, so the factor alpha / r is 1
    return made


def loaded(pipe, loras, rank, form):
    name = "pytorch_lora_weights.safetensors" if form == "lora" else COMFYUI_FILE
    pipe.load_lora_weights(loras[rank][0], weight_name=name, adapter_name=f"rank{rank}")


def assert_adds(pipe, base, sums, places):
    """Asserts that the weights at `places` are the base's plus `sums`, and all others the base's."""
    weights = dict(pipe.unet.named_parameters())
    for name, weight in base.items():
        place, kind = name.rpartition(".")[::2]
        merged = kind == "weight" and place in places
        own = weights.get(name, weights.get(f"{place}.base_layer.{kind}"))
        expected = weight.double() + (sums[place] if merged else 0)
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=2e-5 if merged else 0, msg=name)


@pytest.mark.parametrize("form", FORMATS)
def test_loras_of_two_ranks_in_one_pipeline_add_what_they_say(tiny, loras, form):
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    base = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    first, second = (loras[rank][2] for rank in RANKS)
    for rank in RANKS:
        loaded(pipe, loras, rank, form)
    for scales, factor in (((1, 1), 1.0), ((1, 1), 0.5), ((0.25, 2), 1.0), ((0, 1), 1.0)):
        pipe.set_adapters([f"rank{rank}" for rank in RANKS], adapter_weights=list(scales))
        pipe.fuse_lora(lora_scale=factor)
        sums = {place: factor * (scales[0] * first[place] + scales[1] * second[place]) for place in first}
        assert_adds(pipe, base, sums, first)
        pipe.unfuse_lora()
        assert_adds(pipe, base, dict.fromkeys(first, 0), first)


@pytest.mark.parametrize("form", FORMATS)
def test_one_after_the_other_in_one_pipeline(tiny, loras, form):
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    base = {name: weight.detach().clone() for name, weight in pipe.unet.named_parameters()}
    for rank in (*RANKS, RANKS[0]):
        loaded(pipe, loras, rank, form)
        held = {name: tensor for name, tensor in pipe.unet.named_parameters() if f".rank{rank}." in name}
        wanted = {name.replace("weight", f"rank{rank}.weight"): tensor for name, tensor in loras[rank][1].items()}
        assert held.keys() == wanted.keys() and all(torch.equal(held[name], wanted[name]) for name in held)
        pipe.fuse_lora()
        assert_adds(pipe, base, loras[rank][2], loras[rank][2])
        pipe.unfuse_lora()
        pipe.unload_lora_weights()


def test_each_comfyui_key_is_one_layer_of_the_unet(tiny, loras):
    """ComfyUI names a layer `lora_unet_` plus its name in diffusers with underscores for dots."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    layers = [name.removesuffix(".weight") for name, _ in pipe.unet.named_parameters() if name.endswith(".weight")]
    known = {"lora_unet_" + layer.replace(".", "_"): layer for layer in layers}
    assert len(known) == len(layers)  # no two layers share a key
    for _, weights, products in loras.values():
        keys, _ = StableDiffusion.load(str(tiny), torch.device("cpu")).comfyui_lora(weights, 4)
        assert {known[key.partition(".")[0]] for key in keys} == products.keys()
        assert len(keys) == 3 * len(products)  # down, up and alpha of each
