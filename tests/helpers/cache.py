"""Data caches by a fake encoder whose rows are easy to predict."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seppo_fast.data.cache.latents import LatentCache
from seppo_fast.data.cache.opening import open_or_build
from seppo_fast.data.media.images import load_image
from seppo_fast.data.sources import Source
from seppo_fast.diffusion.conditioning import Conditioning
from tests.helpers.calls import embeds

RESOLUTION = 16


class FakeEncoder:
    """Returns latents (4, 4, 4) and embeddings (5, 3), each a function of its own image or prompt only."""

    def __init__(self, dtype: torch.dtype = torch.float32, name: str = "fake") -> None:
        self.dtype = dtype
        self.name = name
        self.images = 0
        self.prompts: list[str] = []

    def encode_images(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (RESOLUTION, RESOLUTION, 3)
        self.images += len(images)
        small = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 4)
        return torch.cat([small, small.square().sum(1, keepdim=True)], dim=1).to(self.dtype)

    collate = staticmethod(Conditioning.cat)

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        self.prompts += prompts
        rows = [[(len(p) + 1) * (i + 1) + sum(p.encode()) / 7 for i in range(15)] for p in prompts]
        return [embeds(row) for row in torch.tensor(rows).reshape(-1, 5, 3).to(self.dtype).split(1)]

    def too_long(self, prompts: list[str]) -> list[str]:
        return [prompt for prompt in prompts if len(prompt) > 40]

    def fingerprint(self) -> dict[str, str]:
        return {"vae": self.name, "dtype": str(self.dtype)}


def picture(seed: int) -> bytes:
    colours = np.random.default_rng(seed).integers(0, 256, (20, 17, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:04d}.png").write_bytes(picture(i))
        (folder / f"{i:04d}.txt").write_text(f"prompt {i % 5}")
    return folder


def quiet(_: str) -> None:
    pass


def heard(report: Callable[[str], object], call: Callable[[], LatentCache]) -> LatentCache:
    """Returns the result of a call, and passes each line that it prints to `report`, even if it raises."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            return call()
    finally:
        for line in printed.getvalue().splitlines():
            report(line)


def opened(
    source: Source,
    folder: Path,
    encoder: FakeEncoder | None = None,
    report: Callable[[str], object] = quiet,
    **options: object,
) -> LatentCache:
    options = {"resolution": RESOLUTION, "folder": folder, "batch_size": 3} | options
    return heard(report, lambda: open_or_build(source, encoder or FakeEncoder(), **options))


def direct(ref, encoder: FakeEncoder) -> Tensor:
    return encoder.encode_images(torch.from_numpy(load_image(ref, RESOLUTION).copy())[None])[0]
