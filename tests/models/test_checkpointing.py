"""Gradient checkpointing of a UNet with motion modules: it changes no bit, and how much it keeps for the backward."""

import copy

import pytest
import torch
from diffusers import UNetMotionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seppo_fast.capacity.footprint import _LiveBytes
from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.fake import fake_copy
from seppo_fast.models.recompute import Recomputed, without_recomputation
from seppo_fast.models.trainable import make_trainable, trainable
from seppo_fast.models.unet import UNetFamily
from tests.helpers.tiny import tiny_unet

FRAMES = 4
LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16}


def motion_unet(train="lora", precision="fp32", enable=None):
    torch.manual_seed(0)
    unet = UNetMotionModel(
        **LEVELS,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    make_trainable(unet, ModelConfig(train=train, precision=precision, lora_rank=2), seed=0, family=UNetFamily)
    for weight in trainable(unet).values():
        nn.init.normal_(weight, std=0.2)  # a LoRA starts as a zero change
    if enable is not None:
        enable(unet)
    return unet


def forward(unet, rows, size=8):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, FRAMES, size, size, generator=generator)
    embeds = torch.randn(rows * FRAMES, 7, 16, generator=generator)
    return unet(latents, torch.arange(rows) * 300, encoder_hidden_states=embeds, return_dict=False)[0]


def prediction_and_gradients(unet, precision):
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        prediction = forward(unet, 2)
    prediction.float().square().mean().backward()
    return [prediction.detach(), *(weight.grad for weight in trainable(unet).values())]


@pytest.mark.parametrize(("train", "precision"), [("lora", "fp32"), ("lora", "bf16"), ("full", "fp32")])
def test_prediction_and_gradients_keep_their_bits(train, precision):
    kept, made_again = (
        prediction_and_gradients(motion_unet(train, precision, enable), precision)
        for enable in (None, UNetFamily.recompute)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, made_again, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in kept[1:])


def test_every_residual_unit_runs_twice_and_no_more(monkeypatch):
    unet, runs = motion_unet("full", enable=UNetFamily.recompute), []
    units = [module for module in unet.modules() if isinstance(module.forward, Recomputed)]
    # Resnets + spatial transformers + motion modules: 2 + 1 + 2 down, 2 + 1 + 1 in the middle, 4 + 2 + 4 up.
    assert len(units) == 19
    for unit in units:
        inner = next(iter(unit.children()))
        inner.register_forward_pre_hook(lambda module, args: runs.append(module))
    forward(unet, 1).sum().backward()
    assert len(runs) == 2 * len(units)
    runs.clear()
    with without_recomputation(list(unet.modules())):
        forward(unet, 1).sum().backward()
    assert len(runs) == len(units)
    with torch.no_grad():
        forward(unet, 1)
    assert len(runs) == 2 * len(units) and all(unit.forward.on for unit in units)


def test_a_copy_recomputes_with_its_own_weights():
    unet = motion_unet(enable=UNetFamily.recompute)
    other = copy.deepcopy(unet)
    with torch.no_grad():
        for weight in trainable(other).values():
            weight.mul_(2)
    ours = forward(unet, 1).sum()
    theirs = forward(other, 1).sum()
    assert abs(ours - theirs) > 1e-3
    theirs.backward()
    assert all(weight.grad is None for weight in trainable(unet).values())
    assert all(weight.grad is not None for weight in trainable(other).values())


def test_a_unet_for_pictures_is_checkpointed_as_diffusers_does():
    ours, theirs = tiny_unet(), tiny_unet()
    UNetFamily.recompute(ours)
    theirs.enable_gradient_checkpointing()
    marked = [
        {name for name, part in unet.named_modules() if getattr(part, "gradient_checkpointing", False)}
        for unet in (ours, theirs)
    ]
    assert marked[0] == marked[1] != set()
    assert not any(isinstance(module.forward, Recomputed) for module in ours.modules())


def kept_bytes(enable):
    """Returns the bytes kept between forward and backward, without the prediction; fake tensors, latents of 32 x 32."""
    unet = motion_unet(enable=enable)
    with FakeTensorMode(), torch.enable_grad():
        unet = fake_copy(unet)
        with _LiveBytes(unet) as live:
            latents, embeds = torch.empty(2, 4, FRAMES, 32, 32), torch.empty(2 * FRAMES, 7, 16)
            given = latents.nbytes + embeds.nbytes
            prediction = unet(latents, torch.empty(2, dtype=torch.int64), encoder_hidden_states=embeds).sample
            return live._live - given - prediction.nbytes


def test_what_is_kept_is_a_fifth_of_what_diffusers_checkpointing_keeps():
    """The expected sizes were counted before measuring, in units of the features at full resolution (16 channels wide).

    Ours keeps the input of each unit, and what the convolutions between units and the tail save. Down 3 + 1 + 0.75, in
    the middle 2, up 1.5 + 1.25 + 2 and 4 + 4, the head 0.25, the tail 3: 23 in all (the input of a resnet after a
    concatenation is as wide as the concatenation). diffusers does not checkpoint the motion modules of the six layers
    outside the middle. Each of them saves 26 times its width (two attentions 5 each, their norms 2, the feed-forward
    13, its own norm 1) where ours saves 1. diffusers also saves 3 more for each of four spatial transformers: in all
    25 (3 + 3 / 2) + 3 (3 + 1 / 2) = 123 more. So 146 against 23, a factor of 6; the test requires 5.
    """
    unit = 4 * 2 * FRAMES * 16 * 32 * 32
    nothing, theirs, ours = (
        kept_bytes(enable) for enable in (None, UNetMotionModel.enable_gradient_checkpointing, UNetFamily.recompute)
    )
    assert ours == pytest.approx(23 * unit, rel=0.15)
    assert theirs == pytest.approx(146 * unit, rel=0.15)
    assert 5 * ours <= theirs < nothing


def test_units_are_named_as_diffusers_names_them():
    """Fails if a new version of diffusers adds a layer to a block that would not be recomputed."""
    unet = motion_unet()
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        layers = {name for name, _ in block.named_children()} - {"downsamplers", "upsamplers"}
        assert layers <= {"resnets", "attentions", "motion_modules"}
        for name in layers:
            assert all(isinstance(layer, UNetFamily.recomputed) for layer in getattr(block, name))
