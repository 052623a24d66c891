"""Converts published pickles to safetensors, and loads weights under transformers' names.

`convert` keeps the published names, and names are translated when weights are loaded: a converted file then holds
exactly the published tensors, can be compared with the original one by one, and need not be converted again if the
translation is corrected. The translation is cheap, since it makes views only.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import disk_message
from seppo_fast.utils.logging import say

Weights = dict[str, Tensor]


def convert(file: Path) -> Path:
    """Writes the tensors of a published pickle as safetensors beside it, and prints the pickle's SHA-256.

    The pickle is read by `torch.load` with `weights_only`, which runs no code from it.

    Args:
        file: a state dict, or a dictionary with one under `state_dict`.

    Returns:
        The new file: the same name with the suffix `.safetensors`.

    Raises:
        ConfigError: the file does not exist, is no pickle of tensors or contains anything but tensors; the new file
            exists or cannot be written.
    """
    new = file.with_suffix(".safetensors")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file to convert")
    if new.exists():
        raise ConfigError(f"{new} exists; remove it to convert {file.name} again")
    say(f"{file}: sha256 {sha256(file)}")
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # pickle, zipfile and torch raise many kinds
        raise ConfigError(
            f"{file} cannot be read as a pickle of tensors alone, and is not read in any other way, since pickles can "
            f"run code ({str(problem).splitlines()[0] if str(problem) else type(problem).__name__})"
        ) from problem
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, Mapping) or not tensors:
        raise ConfigError(f"{file} contains no state dict; expected tensors by name, or these under 'state_dict'")
    others = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if others:
        raise ConfigError(f"{file}: {others[0]!r} is not a tensor; only a state dict can be converted")
    staging = new.with_name(f".tmp-{os.getpid()}-{new.name}")
    try:
        # Clones, because safetensors refuses tensors that share memory.
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, staging)
        os.replace(staging, new)
    except (OSError, SafetensorError) as problem:
        raise ConfigError(disk_message(new, problem)) from problem
    finally:
        staging.unlink(missing_ok=True)
    say(f"{new}: {len(tensors)} tensors, sha256 {sha256(new)}")
    return new


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's content as hexadecimal digits."""
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_weights(file: Path) -> Weights:
    """Returns the tensors of a safetensors file, on the CPU; raises ConfigError if it cannot be read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, ValueError) as problem:
        raise _unreadable(file, problem) from problem


def count_weights(file: Path) -> int:
    """Returns how many numbers a safetensors file holds, by its header; raises ConfigError if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as problem:
        raise _unreadable(file, problem) from problem


def _unreadable(file: Path, problem: Exception) -> ConfigError:
    return ConfigError(f"{file} cannot be read as safetensors ({problem}); download or convert it again")


def load_transformer(kind: Any, config: Any, weights: Weights, file: Path, dtype: torch.dtype, **options: Any) -> Any:
    """Builds a transformers model in evaluation mode with exactly these weights.

    Args:
        kind: the model's class.
        config: its configuration.
        weights: the weights under the class's names.
        file: the file that they come from, for messages.
        dtype: the model's dtype.
        options: further arguments of the class.

    Raises:
        ConfigError: weights are missing, unknown, or have other shapes.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(config, **options).state_dict().items()}
    refuse_differences(kind.__name__, shapes, weights, file)
    model = kind.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def refuse_differences(what: str, shapes: Mapping[str, torch.Size], weights: Weights, file: Path) -> None:
    """Raises ConfigError unless the names and shapes of weights are those of the model.

    Args:
        what: the model's name, for messages.
        shapes: the model's shapes by name.
        weights: the weights.
        file: the file that they come from, for messages.
    """
    missing, surplus = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or surplus:
        parts = [f"lacks {len(missing)} of its weights, such as {missing[0]}"] if missing else []
        parts += [f"has {len(surplus)} unknown ones, such as {surplus[0]}"] if surplus else []
        raise ConfigError(f"{file} is not a {what}: it {' and '.join(parts)}; is it the file of another scorer?")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            found = tuple(weights[name].shape)
            raise ConfigError(f"{file} is not this {what}: {name} has shape {found} instead of {tuple(shape)}")


_OPEN_CLIP = (
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers spells it so
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.proj$", "visual_projection.weight"),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
    (r"text_projection$", "text_projection.weight"),
)
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLIP_VISION = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def from_open_clip(weights: Weights) -> Weights:
    """Returns a CLIP's weights under the names of transformers' `CLIPModel`, from those of open_clip.

    open_clip's projections are transposed, and `in_proj` is split into those of queries, keys and values. Names that
    are not open_clip's are returned unchanged.
    """
    result: Weights = {}
    for old, tensor in weights.items():
        name = _renamed(old, _OPEN_CLIP)
        place, _, part = name.partition(".layers.")
        number, _, rest = part.partition(".")
        stem, _, kind = rest.rpartition(".")
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rpartition("_")[2]
            for letter, third in zip("qkv", tensor.chunk(3)):
                result[f"{place}.layers.{number}.self_attn.{letter}_proj.{kind}"] = third
        elif stem in _OPEN_CLIP_LAYER:
            result[f"{place}.layers.{number}.{_OPEN_CLIP_LAYER[stem]}.{kind}"] = tensor
        else:
            result[name] = tensor.T if old in ("visual.proj", "text_projection") else tensor
    return result


def from_blip(weights: Weights) -> tuple[Weights, Weights, Weights]:
    """Splits ImageReward's weights into vision, text and `mlp`, the first two under transformers' names.

    Its `blip.text_proj`, `blip.vision_proj` and position ids are unused, and dropped. All other names that are not
    ImageReward's are returned with the text's.
    """
    unused = re.compile(r"blip\.(text_proj|vision_proj)\.|.*\.position_ids$")
    kept = {name: tensor for name, tensor in weights.items() if not unused.match(name)}
    vision = _without("blip.visual_encoder.", kept)
    mlp = _without("mlp.", kept)
    text = {
        name.removeprefix("blip.text_encoder."): tensor
        for name, tensor in kept.items()
        if not name.startswith(("blip.visual_encoder.", "mlp."))
    }
    return {_renamed(name, _BLIP_VISION): tensor for name, tensor in vision.items()}, text, mlp


def _without(prefix: str, weights: Weights) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in patterns:
        renamed, count = re.subn(f"^{pattern}", new, name)
        if count:
            return renamed
    return name
