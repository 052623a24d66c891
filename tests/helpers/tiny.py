"""Writes a tiny Stable Diffusion pipeline and motion adapter with random weights, as ordinary diffusers folders."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def tiny_unet(
    seed: int = 0, second_block: str = "DownBlock2D", channels: tuple[int, int] = (16, 32)
) -> UNet2DConditionModel:
    """Returns the pipeline's UNet: two levels, attention in the first and the middle, optionally in the second too."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", second_block),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


def tiny_pipeline(
    folder: Path, prediction_type: str = "epsilon", seed: int = 0, channels: tuple[int, int] = (16, 32)
) -> Path:
    """Writes a pipeline for pictures of 16 x 16 pixels, with latents of 4 x 8 x 8; returns `folder`."""
    unet = tiny_unet(seed, channels=channels)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=298, eos_token_id=299,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=_byte_tokenizer(folder.with_name(folder.name + "-vocabulary")),
        unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def tiny_adapter(folder: Path, seed: int = 0, **settings) -> Path:
    """Writes motion modules for `tiny_pipeline`, for at most 6 frames, whose output is not zero; returns `folder`."""
    torch.manual_seed(seed)
    fitting = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_norm_num_groups": 8}
    small = {"motion_num_attention_heads": 2, "motion_max_seq_length": 6}
    adapter = MotionAdapter(**fitting | small | settings)
    for name, weight in adapter.named_parameters():
        if "proj_out" in name:
            nn.init.normal_(weight, std=0.2)
    adapter.save_pretrained(folder)
    return folder


def _byte_tokenizer(folder: Path) -> CLIPTokenizer:
    """Returns a CLIP tokenizer with two tokens per printable ASCII character (inside and ending a word), no merges."""
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters]
    words += [f"<|unused{index}|>" for index in range(298 - len(words))] + [_BOS, _EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16,
        bos_token=_BOS, eos_token=_EOS, unk_token=_EOS, pad_token=_EOS,
    )  # fmt: skip
