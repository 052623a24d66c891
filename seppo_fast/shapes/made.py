"""Pictures that the shipped pipeline made of captions of the world, two of each, as preference data sets have them.

One is the best of four by the exact judge, the other was drawn at random among the remaining three. They ship as
latents, which the shipped VAE decodes when a picture is requested; `benchmarks.shapes_world.make_pictures` wrote them.
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
_BLOCK = 64  # pictures decoded at once, and then kept: 6 MB for all


@dataclass(frozen=True)
class MadePictures:
    """What ships.

    Attributes:
        prompts: `COUNT` different captions.
        latents: of each role, `(COUNT, 4, 8, 8)` float16, scaled.
        scores: of each role, `(COUNT,)` float32: shares of the asked-for attributes that the judge found.
    """

    prompts: tuple[str, ...]
    latents: dict[str, Tensor]
    scores: dict[str, NDArray[np.float32]]


@cache
def load() -> MadePictures:
    """Reads the file, once."""
    with safe_open(MADE, framework="pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
        latents = {role: file.get_tensor(role) for role in ROLES}
        scores = {role: file.get_tensor(f"{role}_score").numpy() for role in ROLES}
    return MadePictures(tuple(prompts), latents, scores)


def picture(role: str, index: int) -> NDArray[np.uint8]:
    """Returns the picture (32, 32, 3) of a role for prompt `index`; it does not depend on what else is decoded."""
    return _block(role, index // _BLOCK)[index % _BLOCK]


def digest() -> str:
    """Returns the sha256 (hex) of all that the pictures and prompts depend on: the file and the VAE."""
    sha = hashlib.sha256()
    for path in (MADE, *sorted((PIPELINE / "vae").iterdir())):
        sha.update(path.read_bytes())
    return sha.hexdigest()


@cache
@torch.no_grad()
def _block(role: str, block: int) -> NDArray[np.uint8]:
    """Decodes consecutive pictures together, always the same ones: rounding depends on a batch's size."""
    vae = _vae()
    latents = load().latents[role][block * _BLOCK : (block + 1) * _BLOCK].float() / vae.config.scaling_factor
    pixels = vae.decode(latents).sample.permute(0, 2, 3, 1)
    return np.array(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy(), order="C")


@cache
def _vae() -> AutoencoderKL:
    """Loads the shipped VAE, in float32 on the CPU whatever the device, so that pictures are the same."""
    return AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae").to(memory_format=torch.channels_last)
