"""ImageReward on transformers' BLIP: the text attends to the picture, and a head rates its first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from seppo_fast.scorers.convert import from_blip, load_transformer, read_weights
from seppo_fast.scorers.published import BATCH, AffineHead, PublishedScorer, fitted
from seppo_fast.scorers.resize import normalized, shorter_side

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's values
_TOKENS = 35

# ViT-L/16 and BERT-base with cross-attention. Several values are not transformers' defaults: eps 1e-5 and 8 heads.
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
TEXT: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,  # med_config.json says 768; the original code overrides it
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-12,
}


class _Network:
    """ImageReward's network; see `imagereward` for the arguments."""

    def __init__(self, file: Path, words: Path, device: torch.device, dtype: torch.dtype) -> None:
        vision, text, head = from_blip(read_weights(file))
        # transformers builds cross-attention only for a decoder. ImageReward's text encoder has it, and is not causal:
        # it is called with is_decoder=False.
        config = BlipTextConfig(**TEXT, is_decoder=True)
        self._text = load_transformer(BlipTextModel, config, text, file, dtype, add_pooling_layer=False).to(device)
        self._vision = load_transformer(BlipVisionModel, BlipVisionConfig(**VISION), vision, file, dtype).to(device)
        self._head = AffineHead(head, config.hidden_size, file).to(device)
        self._words = BertTokenizer.from_pretrained(str(words), local_files_only=True)
        self._words.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        self._device, self._dtype = device, dtype

    def rate(self, prompts: Sequence[str], frames: np.ndarray) -> tuple[Tensor, int]:
        """Returns the rewards `(N * F,)` of the frames for their prompts, and how many prompts were cut."""
        ids = self._words(list(prompts), verbose=False)["input_ids"]
        tokens, mask, cut = fitted(ids, _TOKENS, self._words.pad_token_id)
        own = torch.arange(len(prompts)).repeat_interleave(len(frames) // len(prompts))  # each frame's prompt
        rewards = []
        for start in range(0, len(frames), BATCH):
            rows = own[start : start + BATCH]
            shown = shorter_side(frames[start : start + BATCH], VISION["image_size"], rounded=True)
            pixels = normalized(shown).to(self._device, self._dtype)
            states = self._text(
                input_ids=tokens[rows].to(self._device),
                attention_mask=mask[rows].to(self._device),
                encoder_hidden_states=self._vision(pixel_values=pixels).last_hidden_state,
                is_decoder=False,
            ).last_hidden_state
            rewards.append((self._head(states[:, 0]) - MEAN) / STD)
        return torch.cat(rewards), cut


def imagereward(file: Path, words: Path, device: torch.device, dtype: torch.dtype) -> PublishedScorer:
    """Returns ImageReward: about -2 to 2.

    Each picture is rated for its own prompt. The original's `inference_rank` rates every picture for one prompt.

    Source: THUDM/ImageReward c1392c6, `ImageReward/ImageReward.py`; Xu et al., ImageReward.

    Args:
        file: the converted weights, under the original names.
        words: the folder of BERT's vocabulary, `vocab.txt`.
        device: where the network runs.
        dtype: the dtype of vision and text; the head is float32.

    Raises:
        ConfigError: the file is damaged, or its weights are not ImageReward's.
    """
    return PublishedScorer("imagereward", [file], _Network(file, words, device, dtype).rate)
