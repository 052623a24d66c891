"""CLIP towers on transformers' `CLIPModel`, and the scorers on them: PickScore, HPSv2, CLIP score, LAION aesthetic."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from seppo_fast.scorers.convert import Weights, from_open_clip, load_transformer, read_weights
from seppo_fast.scorers.published import BATCH, AffineHead, PublishedScorer, fitted
from seppo_fast.scorers.resize import longest_side_padded, normalized, shorter_side
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import read_json

Resize = Callable[[np.ndarray, int], Tensor]

# Text that ftfy returns unchanged, except for whitespace, which is replaced below.
_PLAIN = re.compile(r"(?!.*&[#\w]+;)[\x20-\x7e\s]*", re.ASCII | re.DOTALL)
# ViT-H/14 of open_clip, on which HPSv2 was trained. It uses GELU, where OpenAI's ViT-L/14 uses quick GELU.
_LAYER = {"hidden_act": "gelu", "num_attention_heads": 16}
VIT_H_14: dict[str, Any] = {
    "projection_dim": 1024,
    "text_config": _LAYER
    | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "eos_token_id": 49407},
    "vision_config": _LAYER
    | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14, "image_size": 224},
}


class ClipTowers:
    """A CLIP whose embeddings are normalized in float32, whatever the dtype of its towers.

    Attributes:
        scale: the exponential of the model's logit scale.
        width: the embeddings' size D.

    Args:
        config: the model's configuration.
        weights: its weights, under transformers' names.
        file: the file that they come from; for messages.
        words: the folder of the vocabulary, `vocab.json` and `merges.txt`.
        resize: resizes pictures `(N, H, W, 3)` uint8 to a given side, `(N, 3, side, side)` float32 in [0, 1].
        device: where the towers run.
        dtype: the towers' dtype.
    """

    def __init__(
        self,
        config: CLIPConfig,
        weights: Weights,
        file: Path,
        words: Path,
        resize: Resize,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        # Older versions of transformers saved these constants with the weights.
        kept = {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}
        self._model = load_transformer(CLIPModel, config, kept, file, dtype).to(device)
        self.scale = float(kept["logit_scale"].double().exp())  # a half type would round it
        self._words = CLIPTokenizer.from_pretrained(str(words), local_files_only=True)
        self._resize, self._device, self._dtype = resize, device, dtype
        self.width = int(config.projection_dim)
        self._side = config.vision_config.image_size
        self._tokens = config.text_config.max_position_embeddings

    def image(self, pictures: np.ndarray) -> Tensor:
        """Returns the embeddings `(N, D)` of pictures `(N, H, W, 3)` uint8, float32 of length 1."""
        rows = []
        for start in range(0, len(pictures), BATCH):
            shown = self._resize(pictures[start : start + BATCH], self._side)
            pixels = normalized(shown).to(self._device, self._dtype)
            rows.append(_unit(self._model.get_image_features(pixel_values=pixels).pooler_output))
        return torch.cat(rows)

    def text(self, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Returns the embeddings `(N, D)` of prompts, float32 of length 1, and how many prompts were cut.

        There is no attention mask: attention is causal and the embedding is that of the first end token, so padding
        has no influence, and it does not matter that open_clip pads with other tokens than transformers.
        """
        ids = self._words(list(prompts), verbose=False)["input_ids"]
        tokens, _, cut = fitted(ids, self._tokens, self._words.eos_token_id)
        rows = [
            _unit(self._model.get_text_features(input_ids=chunk.to(self._device)).pooler_output)
            for chunk in tokens.split(BATCH)
        ]
        return torch.cat(rows), cut


def hub_towers(files: dict[str, Path], resize: Resize, device: torch.device, dtype: torch.dtype) -> ClipTowers:
    """Loads a CLIP in the format of the hub: `config.json`, `model.safetensors` and a vocabulary.

    Args:
        files: the files by name.
        resize: the resizing; see `ClipTowers`.
        device: where the towers run.
        dtype: the towers' dtype.

    Raises:
        ConfigError: a file is damaged, or the weights are not those of the configuration.
    """
    try:
        config = CLIPConfig.from_dict(read_json(files["config.json"]))
    except Exception as problem:  # transformers' checks raise several kinds
        raise ConfigError(f"{files['config.json']} is not a CLIP configuration ({problem})") from problem
    file = files["model.safetensors"]
    return ClipTowers(config, read_weights(file), file, files["vocab.json"].parent, resize, device, dtype)


def pickscore(files: dict[str, Path], device: torch.device, dtype: torch.dtype) -> PublishedScorer:
    """Returns PickScore: exp(logit scale) * cosine, about 20 to 23.

    Source: yuvalkirstain/PickScore f79607f, the README's example; Kirstain et al., Pick-a-Pic.
    """
    towers = hub_towers(files, shorter_side, device, dtype)
    return _cosine("pickscore", towers, towers.scale, [files["model.safetensors"]])


def clip_score(files: dict[str, Path], device: torch.device, dtype: torch.dtype) -> PublishedScorer:
    """Returns the CLIP score: 100 * cosine, not cut off at 0.

    Source: Hessel et al., CLIPScore, with w = 100 in place of 2.5.
    """
    towers = hub_towers(files, partial(shorter_side, rounded=True), device, dtype)
    return _cosine("clip", towers, 100.0, [files["model.safetensors"]])


def hps(name: str, file: Path, words: Path, device: torch.device, dtype: torch.dtype) -> PublishedScorer:
    """Returns HPSv2.0 or HPSv2.1: 100 * cosine, about 23 to 32; scores of the two are not comparable.

    Source: tgxs002/HPSv2 866735e, `hpsv2/evaluation.py`; its `score` returns the cosine.

    Args:
        name: the scorer's name, with the version.
        file: its converted weights, under open_clip's names.
        words: the folder of CLIP's vocabulary.
        device: where the towers run.
        dtype: the towers' dtype.

    Raises:
        ConfigError: the file is damaged, or its weights are not those of a ViT-H/14.
    """
    weights = from_open_clip(read_weights(file))
    towers = ClipTowers(CLIPConfig(**VIT_H_14), weights, file, words, longest_side_padded, device, dtype)
    return _cosine(name, towers, 100.0, [file], open_clip_cleaned)


def aesthetic(files: dict[str, Path], head: Path, device: torch.device, dtype: torch.dtype) -> PublishedScorer:
    """Returns the LAION aesthetic score of a picture: 1 to 10, mostly 5 to 6. It ignores the prompts.

    The head is applied to CLIP ViT-L/14's image embedding of length 1. The original runs CLIP in float16 on a GPU.

    Source: christophschuhmann/improved-aesthetic-predictor 6934dd8, `simple_inference.py`.

    Args:
        files: the CLIP's files by name.
        head: the head's converted weights.
        device: where the networks run.
        dtype: the dtype of CLIP; the head is float32.
    """
    towers = hub_towers(files, partial(shorter_side, rounded=True), device, dtype)
    layers = AffineHead(read_weights(head), towers.width, head).to(device)

    def rate(prompts: Sequence[str], frames: np.ndarray) -> tuple[Tensor, int]:
        return layers(towers.image(frames)), 0

    return PublishedScorer("aesthetic", [files["model.safetensors"], head], rate)


def open_clip_cleaned(prompt: str) -> str:
    """Returns a prompt as open_clip cleans it: ftfy, HTML entities, whitespace, lower case.

    ftfy is needed only for characters beyond printable ASCII (it changes curly quotation marks, among others) and for
    HTML entities.

    Raises:
        ConfigError: ftfy is needed and not installed.
    """
    if not _PLAIN.fullmatch(prompt):
        try:
            import ftfy
        except ImportError as problem:
            raise ConfigError(f"HPSv2 cleans {prompt[:60]!r} with ftfy: pip install ftfy") from problem
        prompt = ftfy.fix_text(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip().lower()


def _cosine(
    name: str, towers: ClipTowers, factor: float, files: list[Path], clean: Callable[[str], str] = str
) -> PublishedScorer:
    def rate(prompts: Sequence[str], frames: np.ndarray) -> tuple[Tensor, int]:
        text, cut = towers.text([clean(prompt) for prompt in prompts])
        image = towers.image(frames)
        return factor * (image * text.repeat_interleave(len(image) // len(text), dim=0)).sum(dim=1), cut

    return PublishedScorer(name, files, rate)


def _unit(embeddings: Tensor) -> Tensor:
    """Returns embeddings in float32, divided by their length; a zero embedding stays zero instead of becoming NaN."""
    embeddings = embeddings.float()
    length = embeddings.norm(dim=-1, keepdim=True)
    return embeddings / length.masked_fill(length == 0, 1)
