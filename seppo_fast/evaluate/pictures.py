"""Pictures at fixed prompts and fixed seeds, and grids of them side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from seppo_fast.diffusion import Sampler, keyed_noise
from seppo_fast.families.sd import StableDiffusion
from seppo_fast.forward import Forward
from seppo_fast.rollout import sample_latents

CAPTION_WIDTH = 260  # of `side_by_side`
_FRAMES = 8  # of a clip, shown in a picture


def generate(
    family: StableDiffusion,
    forward: Forward,
    model: nn.Module,
    sampler: Sampler,
    prompts: Sequence[str],
    *,
    resolution: int,
    seed: int,
) -> np.ndarray:
    """Pictures `(len(prompts), H, W, 3)` uint8, or clips `(len(prompts), F, H, W, 3)`, as the family makes them.

    Picture i depends on the model, prompt i, seed and i alone.

    Two models called with the same prompts and seed start from the same noise: their scores are paired.
    """
    shape = family.latent_shape(resolution)
    noise = keyed_noise(seed, "evaluation", [(0, index) for index in range(len(prompts))], shape)
    embeds = torch.cat([family.encode_prompts(list(chunk)) for chunk in _chunks(prompts, 256)])
    latents = sample_latents(forward, model, sampler, noise, embeds, family.encode_prompts([""]))
    pictures = family.decode(latents)
    family.park_encoders()
    return pictures


class FixedPrompts:
    """The same prompts and seeds again and again: base beside current.

    Args:
        family: the model.
        forward: how it is called.
        model: its UNet, which as it is now is the base; for all processes to call where it is sharded.
        sampler: how pictures are made.
        prompts: one row each.
        resolution: in pixels.
        seed: of the starting noise.
    """

    def __init__(
        self,
        family: StableDiffusion,
        forward: Forward,
        model: nn.Module,
        sampler: Sampler,
        prompts: Sequence[str],
        resolution: int,
        seed: int = 0,
    ) -> None:
        self._prompts = list(prompts)
        self._generate = partial(
            generate, family, forward, model, sampler, self._prompts, resolution=resolution, seed=seed
        )
        self._base = self._generate()

    def write(self, file: Path | None, name: str) -> None:
        """Writes a PNG of base beside the model as it is now, under the title `name`; None: only generates."""
        pictures = self._generate()
        if file is not None:
            side_by_side(self._prompts, {"base": self._base, name: pictures}).save(file)


def _chunks(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def side_by_side(
    prompts: Sequence[str], columns: dict[str, np.ndarray], *, cell: int = 128, caption_width: int = CAPTION_WIDTH
) -> Image.Image:
    """One row a prompt, one column a model: prompt text at the left, pictures `(N, H, W, 3)` uint8 beside it.

    Of clips `(N, F, H, W, 3)` a column shows a few frames, first to last.
    """
    head = 24
    films = {name: pictures if pictures.ndim == 5 else pictures[:, None] for name, pictures in columns.items()}
    shown = min(_FRAMES, max(film.shape[1] for film in films.values()))
    width = caption_width + cell * shown * len(columns)
    canvas = Image.new("RGB", (width, head + cell * len(prompts)), "white")
    font = ImageFont.load_default(size=15)
    draw = ImageDraw.Draw(canvas)
    for column, (name, film) in enumerate(films.items()):
        left = caption_width + column * cell * shown
        draw.text((left + 6, 3), name, fill="black", font=font)
        # Small pictures are enlarged without smoothing, so that what is shown is what the model made.
        filter_ = Image.Resampling.NEAREST if film.shape[2] < cell else Image.Resampling.LANCZOS
        for place, frame in enumerate(np.linspace(0, film.shape[1] - 1, shown).round().astype(int)):
            for row, picture in enumerate(film[:, frame]):
                tile = Image.fromarray(picture).resize((cell - 4, cell - 4), filter_)
                canvas.paste(tile, (left + place * cell + 2, head + row * cell + 2))
    for row, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, caption_width // 9)[:6])
        draw.multiline_text((6, head + row * cell + 8), text, fill="black", font=font)
    return canvas


def animate(
    file: Path, prompts: Sequence[str], columns: dict[str, np.ndarray], *, cell: int = 128, milliseconds: int = 150
) -> None:
    """Writes clips `(N, F, H, W, 3)` uint8 as `side_by_side`, into an animated WebP that runs for ever."""
    count = next(iter(columns.values())).shape[1]
    frames = [
        side_by_side(prompts, {name: film[:, frame] for name, film in columns.items()}, cell=cell)
        for frame in range(count)
    ]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, quality=90)
