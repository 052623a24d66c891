"""Pictures that the shipped pipeline made for captions of the world, two per caption, as in preference data sets.

One is the best of four according to the exact judge, the other was drawn at random from the remaining three. They ship
as latents, which the shipped VAE decodes on request; `benchmarks.shapes_world.make_pictures` wrote them.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from . import MADE, PIPELINE

COUNT = 1024  # prompts
ROLES = ("best", "other")
_BLOCK = 64  # pictures decoded at once; all decoded pictures are kept in memory, 6 MB


@dataclass(frozen=True)
class MadePictures:
    """The content of the shipped file.

    Attributes:
        prompts: `COUNT` different captions.
        latents: for each role, scaled latents `(COUNT, 4, 8, 8)` float16.
        scores: for each role, the judge's scores `(COUNT,)` float32: shares of the caption's attributes it found.
    """

    prompts: tuple[str, ...]
    latents: dict[str, Tensor]
    scores: dict[str, NDArray[np.float32]]


@cache
def load() -> MadePictures:
    """Reads the shipped file; the result is cached."""
    with safe_open(MADE, framework="pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
        latents = {role: file.get_tensor(role) for role in ROLES}
        scores = {role: file.get_tensor(f"{role}_score").numpy() for role in ROLES}
    return MadePictures(tuple(prompts), latents, scores)


def picture(role: str, index: int) -> NDArray[np.uint8]:
    """Returns the picture (32, 32, 3) of a role for prompt `index`; it does not depend on which others are decoded."""
    return _block(role, index // _BLOCK)[index % _BLOCK]


def digest() -> str:
    """Returns the SHA-256 (hex) of the file and the VAE, on which pictures and prompts depend."""
    sha = hashlib.sha256()
    for path in (MADE, *sorted((PIPELINE / "vae").iterdir())):
        sha.update(path.read_bytes())
    return sha.hexdigest()


@cache
@torch.no_grad()
def _block(role: str, block: int) -> NDArray[np.uint8]:
    """Decodes a fixed block of consecutive pictures together, because rounding depends on the batch size."""
    vae = _vae()
    latents = load().latents[role][block * _BLOCK : (block + 1) * _BLOCK].float() / vae.config.scaling_factor
    pixels = vae.decode(latents).sample.permute(0, 2, 3, 1)
    return np.array(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy(), order="C")


@cache
def _vae() -> AutoencoderKL:
    """Loads the shipped VAE, always in float32 on the CPU, so that pictures are the same with any device."""
    return AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae").to(memory_format=torch.channels_last)
