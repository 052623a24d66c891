"""Writes the scorers' files with tiny random networks, in the formats in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

SIDE = 28  # pixels
BEGIN, END = 298, 299
CLIP = {
    "projection_dim": 24,
    "text_config": {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "hidden_act": "gelu",
        "num_attention_heads": 2, "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END,
    },
    "vision_config": {
        "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 14, "hidden_act": "gelu",
    },
}  # fmt: skip
# With ImageReward's settings that are not transformers' defaults.
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16, "layer_norm_eps": 1e-6,
}  # fmt: skip
TEXT = {
    "vocab_size": 12, "hidden_size": 18, "encoder_hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2,
    "num_attention_heads": 3, "layer_norm_eps": 1e-12, "bos_token_id": 10, "sep_token_id": 3,
}  # fmt: skip
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "on", "mat"]


def clip_words(folder: Path) -> Path:
    """Writes a CLIP vocabulary: two tokens per printable ASCII character (inside and ending a word), no merges."""
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters]
    words += [f"<|unused{index}|>" for index in range(BEGIN - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def clip_ids(prompt: str) -> list[int]:
    """Returns a prompt's token ids in that vocabulary, all of them."""
    inner = [ord(c) - 33 + 94 * (i == len(word) - 1) for word in prompt.lower().split() for i, c in enumerate(word)]
    return [BEGIN, *inner, END]


def tiny_clip(folder: Path, seed: int = 0, **text: object) -> Path:
    """Writes a CLIP as the hub has it, with its vocabulary; `text` changes settings of the text tower."""
    torch.manual_seed(seed)
    config = CLIPConfig(**CLIP | {"text_config": CLIP["text_config"] | text})
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.logit_scale, 4.3)
    model.save_pretrained(folder)
    return clip_words(folder)


def open_clip_state(folder: Path) -> dict[str, Tensor]:
    """Returns the weights of `tiny_clip` under open_clip's names."""
    old = load_file(folder / "model.safetensors")
    new = {
        "logit_scale": old["logit_scale"],
        "text_projection": old["text_projection.weight"].T.contiguous(),
        "visual.proj": old["visual_projection.weight"].T.contiguous(),
        "visual.class_embedding": old["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": old["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": old["vision_model.embeddings.patch_embedding.weight"],
        "positional_embedding": old["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": old["text_model.embeddings.token_embedding.weight"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms["ln_final"] = "text_model.final_layer_norm"
    for tower, blocks in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(2):
            a, b = f"{tower}.encoder.layers.{layer}", f"{blocks}.resblocks.{layer}"
            norms |= {f"{b}.ln_1": f"{a}.layer_norm1", f"{b}.ln_2": f"{a}.layer_norm2"}
            norms |= {f"{b}.mlp.c_fc": f"{a}.mlp.fc1", f"{b}.mlp.c_proj": f"{a}.mlp.fc2"}
            norms[f"{b}.attn.out_proj"] = f"{a}.self_attn.out_proj"
            for kind in ("weight", "bias"):
                parts = [old[f"{a}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                new[f"{b}.attn.in_proj_{kind}"] = torch.cat(parts)
    for here, there in norms.items():
        new |= {f"{here}.{kind}": old[f"{there}.{kind}"] for kind in ("weight", "bias")}
    assert len(new) == len(old) - 4 * 4  # queries, keys and values of four layers are one
    return new


def head_state(width: int, seed: int = 0) -> dict[str, Tensor]:
    """Returns random weights of the aesthetic head, under the published names."""
    torch.manual_seed(seed)
    widths = (width, 1024, 128, 64, 16, 1)
    state = {}
    for place, inner, outer in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.randn(outer, inner) / inner**0.5
        state[f"layers.{place}.bias"] = torch.randn(outer) / 4
    return state


def bert_words(folder: Path) -> Path:
    """Writes a BERT vocabulary of a few words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    return folder


def imagereward_state(seed: int = 0) -> dict[str, Tensor]:
    """Returns random weights of a tiny ImageReward, under the published names, with those that are unused."""
    torch.manual_seed(seed)
    wide, text, width, inner = VISION["hidden_size"], TEXT["hidden_size"], VISION["intermediate_size"], 30
    sizes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, wide),
        "blip.visual_encoder.pos_embed": (1, 5, wide),
        "blip.visual_encoder.patch_embed.proj.weight": (wide, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (wide,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (12, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, text),
        "blip.text_proj.weight": (8, text),
        "blip.vision_proj.weight": (8, wide),
    }
    linear, norm = {}, {"blip.visual_encoder.norm": wide, "blip.text_encoder.embeddings.LayerNorm": text}
    for layer in range(2):
        here = f"blip.visual_encoder.blocks.{layer}"
        norm |= {f"{here}.norm1": wide, f"{here}.norm2": wide}
        linear |= {f"{here}.attn.qkv": (3 * wide, wide), f"{here}.attn.proj": (wide, wide)}
        linear |= {f"{here}.mlp.fc1": (width, wide), f"{here}.mlp.fc2": (wide, width)}
        here = f"blip.text_encoder.encoder.layer.{layer}"
        for part, seen in (("attention", text), ("crossattention", wide)):
            linear[f"{here}.{part}.self.query"] = (text, text)
            linear |= {f"{here}.{part}.self.{name}": (text, seen) for name in ("key", "value")}
            linear[f"{here}.{part}.output.dense"] = (text, text)
            norm[f"{here}.{part}.output.LayerNorm"] = text
        linear |= {f"{here}.intermediate.dense": (inner, text), f"{here}.output.dense": (text, inner)}
        norm[f"{here}.output.LayerNorm"] = text
    for name, (outer, inside) in linear.items():
        sizes |= {f"{name}.weight": (outer, inside), f"{name}.bias": (outer,)}
    state = {name: torch.randn(size) / 4 for name, size in sizes.items()}
    for name, size in norm.items():
        state |= {f"{name}.weight": 1 + torch.randn(size) / 4, f"{name}.bias": torch.randn(size) / 4}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return state | {f"mlp.{name}": tensor for name, tensor in head_state(text, seed + 1).items()}
