"""The network of FVD: I3D trained on Kinetics-400, with its 400 logits as features.

Unverified on the true weights: only the arithmetic is tested, on random weights of the published shapes. It reads a
plain state dict (VideoGPT's i3d_pretrained_400.pt, converted). The TorchScript file that StyleGAN-V publishes is code
and is never loaded.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seppo_fast.evaluation.metrics import keys
from seppo_fast.evaluation.metrics.networks import Unit, add_units, check_pictures, load_network

SIDE = 224
MIN_FRAMES = 10


class I3d(nn.Module):
    """Inflated Inception-v1 (Carreira & Zisserman 2017, arXiv 1705.07750); unverified on the true weights.

    All convolutions and poolings are padded with zeros as TensorFlow's SAME padding does.
    """

    def __init__(self) -> None:
        super().__init__()
        add_units(self, keys.I3D, Unit)
        add_units(self, {"logits.conv3d": keys.I3D_LOGITS["logits.conv3d.weight"]}, lambda s: nn.Conv3d(s[1], s[0], 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps clips (N, 3, F, 224, 224) in [-1, 1], F at least 10, to logits (N, 400), averaged over time."""
        x = self._unit(x, "Conv3d_1a_7x7", 2)
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self._unit(self._unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
        x = max_pool(x, (1, 3, 3), (1, 2, 2))
        for block in ("3b", "3c"):
            x = self.mixed(x, f"Mixed_{block}")
        x = max_pool(x, (3, 3, 3), (2, 2, 2))
        for block in ("4b", "4c", "4d", "4e", "4f"):
            x = self.mixed(x, f"Mixed_{block}")
        x = max_pool(x, (2, 2, 2), (2, 2, 2))
        for block in ("5b", "5c"):
            x = self.mixed(x, f"Mixed_{block}")
        return self.get_submodule("logits.conv3d")(F.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))

    def mixed(self, x: Tensor, block: str) -> Tensor:
        """Applies a block of four branches."""
        branches = [
            self._unit(x, f"{block}.b0"),
            self._unit(self._unit(x, f"{block}.b1a"), f"{block}.b1b"),
            self._unit(self._unit(x, f"{block}.b2a"), f"{block}.b2b"),
            self._unit(max_pool(x, (3, 3, 3), (1, 1, 1)), f"{block}.b3b"),
        ]
        return torch.cat(branches, 1)

    def _unit(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        unit = self.get_submodule(name)
        assert isinstance(unit, Unit)
        return unit(_same(x, unit.kernel, (stride, stride, stride)), stride, (0, 0, 0))


def max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Takes maxima with SAME padding; zeros are added, which are not above any output of a ReLU."""
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


def load_i3d(file: Path, device: torch.device) -> I3d:
    """Loads the network from a safetensors file with the names of `keys.I3D`.

    Raises:
        ConfigError: the file is missing, not safetensors, or holds other weights.
    """
    needed = keys.normalised(keys.I3D, "conv3d") | keys.I3D_LOGITS
    return load_network(I3d, {file: (needed, {})}, "I3D", device)


def features(network: I3d, clips: np.ndarray) -> np.ndarray:
    """Computes the logits of uint8 clips `(N, F, H, W, 3)`, F at least 10; returns `(N, 400)` float32.

    Raises:
        ValueError: `clips` has another shape or dtype, or too few frames.
    """
    check_pictures(clips, 5)
    if clips.shape[1] < MIN_FRAMES:
        raise ValueError(f"clips: FVD needs at least {MIN_FRAMES} frames, got {clips.shape[1]}")
    device = next(network.parameters()).device
    with torch.no_grad():
        return network(prepared(torch.from_numpy(clips).to(device))).cpu().numpy()


def prepared(clips: Tensor, side: int = SIDE) -> Tensor:
    """Scales uint8 clips (N, F, H, W, 3) to (N, 3, F, side, side) in [-1, 1].

    The shorter side becomes `side` (bilinear, not antialiased), the longer one is rounded up, and the middle is cropped
    (wilson1yan/VideoGPT, commit c6655e8; JunyaoHu/common_metrics_on_video_quality, commit 5f75173).
    """
    count, frames, height, width = clips.shape[:4]
    scale = side / min(height, width)
    tall, wide = (side if size == min(height, width) else math.ceil(size * scale) for size in (height, width))
    flat = clips.reshape(-1, height, width, 3).permute(0, 3, 1, 2).float() / 255
    flat = F.interpolate(flat, (tall, wide), mode="bilinear", align_corners=False)
    top, left = (tall - side) // 2, (wide - side) // 2
    flat = flat[:, :, top : top + side, left : left + side] * 2 - 1
    return flat.reshape(count, frames, 3, side, side).transpose(1, 2).contiguous()


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Adds zeros so that each of the last three sizes becomes ceil(size / stride); an odd one goes to the end."""
    pads: list[int] = []
    for size, wide, step in zip(x.shape[:1:-1], kernel[::-1], stride[::-1]):
        missing = max((math.ceil(size / step) - 1) * step + wide - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return F.pad(x, pads)
