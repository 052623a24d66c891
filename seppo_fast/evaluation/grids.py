"""Draws pictures and clips of several models side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION_WIDTH = 260  # pixels; the default of `side_by_side`
_FRAMES = 8  # the most frames of a clip that a picture shows


def side_by_side(
    prompts: Sequence[str], columns: dict[str, np.ndarray], *, cell: int = 128, caption_width: int = CAPTION_WIDTH
) -> Image.Image:
    """Returns an image with one row per prompt and one column per model, the prompts' text at the left.

    Args:
        prompts: the N prompts.
        columns: for each model, by name, pictures `(N, H, W, 3)` uint8, or clips `(N, F, H, W, 3)`, of which a few
            frames are shown, from the first to the last.
        cell: the side of a picture's cell, in pixels.
        caption_width: the width of the prompts' column, in pixels.
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
        # Small pictures are enlarged without smoothing, so that every pixel of the model is visible.
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
    """Writes clips `(N, F, H, W, 3)` uint8 as an endless animated WebP, each frame drawn by `side_by_side`."""
    count = next(iter(columns.values())).shape[1]
    frames = [
        side_by_side(prompts, {name: film[:, frame] for name, film in columns.items()}, cell=cell)
        for frame in range(count)
    ]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, quality=90)
