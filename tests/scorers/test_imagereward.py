"""ImageReward with a tiny network under the original names, against a plain forward pass in float64 written here."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm, softmax
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from seppo_fast.scorers import imagereward as module
from seppo_fast.scorers.convert import convert, sha256
from seppo_fast.scorers.registry import load_scorer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.tiny_scorers import BERT_WORDS, TEXT, VISION, bert_words, imagereward_state

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "A cat on a red, red mat", " ".join(["red cat"] * 99)]  # 5, 9 and 200 tokens
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = bert_words(tmp_path_factory.mktemp("scorers") / "imagereward")
    torch.save(imagereward_state(), place / "ImageReward.pt")
    convert(place / "ImageReward.pt")
    return place.parent


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    monkeypatch.setattr(module, "VISION", VISION)
    monkeypatch.setattr(module, "TEXT", TEXT)


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


class Reference:
    """The original's forward pass: ViT with pre-norm, BERT with post-norm and cross-attention, in float64."""

    def __init__(self):
        self.weights = {name: tensor.double() for name, tensor in imagereward_state().items()}

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x, eps):
        return layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def attention(self, q, k, v, heads):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        shares = softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        return (shares @ v).transpose(0, 1).flatten(1)

    def vision(self, picture):
        pixels = torch.from_numpy((picture / 255 - MEAN) / STD)
        patches = pixels.unflatten(1, (2, 16)).unflatten(0, (2, 16)).permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)
        here = "blip.visual_encoder"
        kernel = self.weights[f"{here}.patch_embed.proj.weight"].flatten(1)
        x = patches @ kernel.T + self.weights[f"{here}.patch_embed.proj.bias"]
        x = torch.cat([self.weights[f"{here}.cls_token"][0], x]) + self.weights[f"{here}.pos_embed"][0]
        for layer in range(2):
            block = f"{here}.blocks.{layer}"
            q, k, v = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, dim=-1)
            x = x + self.linear(f"{block}.attn.proj", self.attention(q, k, v, 4))
            hidden = gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{here}.norm", x, 1e-6)

    def text(self, ids, seen):
        here = "blip.text_encoder.embeddings"
        x = self.weights[f"{here}.word_embeddings.weight"][ids]
        x = self.norm(f"{here}.LayerNorm", x + self.weights[f"{here}.position_embeddings.weight"][: len(ids)], 1e-12)
        for layer in range(2):
            block = f"blip.text_encoder.encoder.layer.{layer}"
            for part in ("attention", "crossattention"):
                source = x if part == "attention" else seen
                q = self.linear(f"{block}.{part}.self.query", x)
                k, v = (self.linear(f"{block}.{part}.self.{name}", source) for name in ("key", "value"))
                out = self.linear(f"{block}.{part}.output.dense", self.attention(q, k, v, 3))
                x = self.norm(f"{block}.{part}.output.LayerNorm", out + x, 1e-12)
            out = self.linear(f"{block}.output.dense", gelu(self.linear(f"{block}.intermediate.dense", x)))
            x = self.norm(f"{block}.output.LayerNorm", out + x, 1e-12)
        return x

    def reward(self, prompt, picture):
        words = prompt.lower().replace(",", " ,").split()
        ids = [2, *(BERT_WORDS.index(word) if word in BERT_WORDS else 1 for word in words), 3]
        ids = ids if len(ids) <= 35 else [*ids[:34], 3]
        value = self.text(torch.tensor(ids), self.vision(picture))[0]  # no padding: the mask must hide it
        for place in (0, 2, 4, 6, 7):
            value = self.linear(f"mlp.layers.{place}", value)
        return (float(value) - 0.16717362830052426) / 1.0333394966054072


def test_rewards_are_those_of_the_plain_forward_pass(folder, pictures):
    scorer = load_scorer("imagereward", CPU, torch.float32, folder)
    expected = [Reference().reward(prompt, picture) for prompt, picture in zip(PROMPTS, pictures, strict=True)]
    assert scorer(PROMPTS, pictures) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 0.01 and scorer.cut == 1
    assert (scorer.name, scorer.digest) == ("imagereward", sha256(folder / "imagereward/ImageReward.safetensors"))


def test_every_picture_is_rated_for_its_own_prompt(folder, pictures):
    scorer = load_scorer("imagereward", CPU, torch.float32, folder)
    forward, crossed = scorer(PROMPTS[:2], pictures[:2]), scorer(PROMPTS[1::-1], pictures[:2])
    reference = Reference()
    assert crossed == pytest.approx([reference.reward(PROMPTS[1 - i], pictures[i]) for i in range(2)], abs=1e-5)
    assert np.abs(forward - crossed).max() > 1e-3


def test_a_clip_has_the_mean_reward_of_its_frames(folder, monkeypatch):
    clips = np.random.default_rng(1).integers(0, 256, (2, 3, 50, 33, 3), dtype=np.uint8)
    scorer = load_scorer("imagereward", CPU, torch.float32, folder)
    means = [scorer([prompt] * 3, clip).mean() for prompt, clip in zip(PROMPTS, clips, strict=False)]
    monkeypatch.setattr(module, "BATCH", 4)  # a batch ends inside the second clip
    assert scorer(PROMPTS[:2], clips) == pytest.approx(means, abs=1e-5)


def test_the_special_tokens_are_blips(folder):
    """They follow the vocabulary: [DEC], then [ENC]."""
    reader = module._Network(folder / "imagereward/ImageReward.safetensors", folder / "imagereward", CPU, torch.float32)
    assert reader._words("[DEC] [ENC]")["input_ids"] == [2, 10, 11, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.norm.weight": None}, "not a BlipVisionModel: it lacks 1 .* post_layernorm"),
        ({"blip.text_encoder.pooler.dense.weight": torch.ones(2)}, "not a BlipTextModel: it has 1 unknown"),
        ({"other": torch.ones(2)}, "has 1 unknown ones, such as other"),
        ({"mlp.layers.7.bias": None}, r"not a head: it lacks 1 of its weights, such as layers\.7\.bias"),
        ({"mlp.layers.7.bias": torch.ones(2)}, r"layers\.7\.bias has shape \(2,\) instead of \(1,\)"),
    ],
)
def test_missing_surplus_and_misshapen_weights_are_refused(tmp_path, change, message):
    place = bert_words(tmp_path / "imagereward")
    state = {name: tensor for name, tensor in (imagereward_state() | change).items() if tensor is not None}
    torch.save(state, place / "ImageReward.pt")
    convert(place / "ImageReward.pt")
    with pytest.raises(ConfigError, match=message):
        load_scorer("imagereward", CPU, torch.float32, tmp_path)


def test_the_configuration_is_that_of_the_published_file(monkeypatch):
    monkeypatch.undo()
    with torch.device("meta"):
        text = BlipTextModel(BlipTextConfig(**module.TEXT), add_pooling_layer=False)
        vision = BlipVisionModel(BlipVisionConfig(**module.VISION))
    count = sum(parameter.numel() for network in (text, vision) for parameter in network.parameters())
    widths = (768, 1024, 128, 64, 16, 1)
    count += sum((inner + 1) * outer for inner, outer in pairwise(widths))
    unused = 256 * (768 + 1) + 256 * (1024 + 1)  # text_proj and vision_proj
    assert count == 446_206_689
    assert round(4 * (count + unused) / 1e7) == 179  # the published file has 1.79 GB
    assert (text.config.layer_norm_eps, vision.config.layer_norm_eps) == (1e-12, 1e-6)
    assert text.encoder.layer[0].crossattention.self.key.in_features == 1024
    assert text.config.hidden_size // text.config.num_attention_heads == 64
    assert vision.config.hidden_size // vision.config.num_attention_heads == 64
