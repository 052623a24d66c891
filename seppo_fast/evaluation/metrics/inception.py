"""The network of FID and KID: Inception-v3 of 2015-12-05 with 2048 pooled features.

Unverified on the true weights: only the arithmetic of its parts is tested, on random weights of the published shapes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from seppo_fast.evaluation.metrics import keys
from seppo_fast.evaluation.metrics.networks import Unit, add_units, check_pictures, load_network

SIDE = 299


class Inception(nn.Module):
    """Inception-v3 up to its last pooling, as used for FID; unverified on the true weights.

    It differs from torchvision's in its pooling branches (mseitzer/pytorch-fid, commit 1232cd6): averages leave the
    padding out, and the last block takes the maximum instead.
    """

    def __init__(self) -> None:
        super().__init__()
        add_units(self, keys.INCEPTION, Unit)

    def forward(self, x: Tensor) -> Tensor:
        """Maps pictures (N, 3, 299, 299) in [-1, 1] to features (N, 2048)."""
        x = self._unit(x, "Conv2d_1a_3x3", stride=2, padding=(0, 0))
        x = self._unit(x, "Conv2d_2a_3x3", padding=(0, 0))
        x = F.max_pool2d(self._unit(x, "Conv2d_2b_3x3"), 3, 2)
        x = self._unit(x, "Conv2d_3b_1x1")
        x = F.max_pool2d(self._unit(x, "Conv2d_4a_3x3", padding=(0, 0)), 3, 2)
        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = self.block_5(x, block)
        x = self._reduced(x, "Mixed_6a", ["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"])
        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = self.block_6(x, block)
        long = [f"branch7x7x3_{number}" for number in (1, 2, 3, 4)]
        x = self._reduced(x, "Mixed_7a", ["branch3x3_1", "branch3x3_2"], long)
        x = self.block_7(x, "Mixed_7b", average_pool(x))
        x = self.block_7(x, "Mixed_7c", F.max_pool2d(x, 3, 1, padding=1))
        return x.mean((2, 3))

    def block_5(self, x: Tensor, block: str) -> Tensor:
        """Applies a block with 1x1, 5x5 and double 3x3 branches, and a pooling branch."""
        branches = [
            self._chain(x, block, ["branch1x1"]),
            self._chain(x, block, ["branch5x5_1", "branch5x5_2"]),
            self._chain(x, block, ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]),
            self._chain(average_pool(x), block, ["branch_pool"]),
        ]
        return torch.cat(branches, 1)

    def block_6(self, x: Tensor, block: str) -> Tensor:
        """Applies a block with 1x1, 7x7 and double 7x7 branches (in 1x7 and 7x1 steps), and a pooling branch."""
        branches = [
            self._chain(x, block, ["branch1x1"]),
            self._chain(x, block, [f"branch7x7_{number}" for number in (1, 2, 3)]),
            self._chain(x, block, [f"branch7x7dbl_{number}" for number in (1, 2, 3, 4, 5)]),
            self._chain(average_pool(x), block, ["branch_pool"]),
        ]
        return torch.cat(branches, 1)

    def block_7(self, x: Tensor, block: str, pooled: Tensor) -> Tensor:
        """Applies a block with forked 3x3 branches; its pooling branch takes `pooled`, shaped as `x`."""
        short = self._chain(x, block, ["branch3x3_1"])
        long = self._chain(x, block, ["branch3x3dbl_1", "branch3x3dbl_2"])
        branches = [
            self._chain(x, block, ["branch1x1"]),
            self._chain(short, block, ["branch3x3_2a"]),
            self._chain(short, block, ["branch3x3_2b"]),
            self._chain(long, block, ["branch3x3dbl_3a"]),
            self._chain(long, block, ["branch3x3dbl_3b"]),
            self._chain(pooled, block, ["branch_pool"]),
        ]
        return torch.cat(branches, 1)

    def _reduced(self, x: Tensor, block: str, *chains: list[str]) -> Tensor:
        """Applies a block that halves the size: the last unit of each chain has stride 2 and no padding."""
        branches = []
        for *names, last in chains:
            branches.append(self._unit(self._chain(x, block, names), f"{block}.{last}", stride=2, padding=(0, 0)))
        return torch.cat([*branches, F.max_pool2d(x, 3, 2)], 1)

    def _chain(self, x: Tensor, block: str, names: list[str]) -> Tensor:
        for name in names:
            x = self._unit(x, f"{block}.{name}")
        return x

    def _unit(self, x: Tensor, name: str, stride: int = 1, padding: tuple[int, ...] | None = None) -> Tensor:
        return self.get_submodule(name)(x, stride, padding)


def average_pool(x: Tensor) -> Tensor:
    """Averages 3 x 3 neighbourhoods at stride 1; at the border, over the pixels that exist."""
    return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)


def load_inception(file: Path, device: torch.device) -> Inception:
    """Loads the network from a safetensors file with the names of `keys.INCEPTION`.

    Raises:
        ConfigError: the file is missing, not safetensors, or holds other weights.
    """
    needed = keys.normalised(keys.INCEPTION, "conv")
    return load_network(Inception, {file: (needed, keys.INCEPTION_UNUSED)}, "Inception", device)


def features(network: Inception, pictures: np.ndarray, *, clean: bool = False) -> np.ndarray:
    """Computes the pooled features of uint8 pictures `(N, H, W, 3)`; returns `(N, 2048)` float32.

    Args:
        network: the network.
        pictures: the pictures.
        clean: resize as clean-FID does (GaParmar/clean-fid, commit e88c4d6): bicubic with antialiasing, each channel in
            float, clipped to 0..255. Otherwise as the original TensorFlow graph does (toshas/torch-fidelity, commit
            5211a9e): bilinear without antialiasing, aligned at the top left corner. Values of the two do not compare.

    Raises:
        ValueError: `pictures` has another shape or dtype.
    """
    check_pictures(pictures, 4)
    device = next(network.parameters()).device
    resized = clean_resize(pictures) if clean else tensorflow_resize(torch.from_numpy(pictures).to(device))
    with torch.no_grad():
        return network((resized.to(device) - 128) / 128).cpu().numpy()


def tensorflow_resize(pictures: Tensor, side: int = SIDE) -> Tensor:
    """Resizes uint8 (N, H, W, 3) to float32 (N, 3, side, side) as TensorFlow 1 did: pixel i reads at i * in / out."""
    x = pictures.permute(0, 3, 1, 2).float()
    for axis in (2, 3):
        place = torch.arange(side, device=x.device, dtype=torch.float32) * (x.shape[axis] / side)
        low = place.floor().long().clamp(max=x.shape[axis] - 1)
        high = (low + 1).clamp(max=x.shape[axis] - 1)
        share = (place - low).reshape(-1, 1) if axis == 2 else place - low
        first, second = x.index_select(axis, low), x.index_select(axis, high)
        x = first + (second - first) * share
    return x


def clean_resize(pictures: np.ndarray, side: int = SIDE) -> Tensor:
    """Resizes uint8 (N, H, W, 3) to float32 (N, 3, side, side) with PIL's antialiased bicubic filter, unrounded."""
    channels = pictures.transpose(0, 3, 1, 2).astype(np.float32)
    resized = np.empty((*channels.shape[:2], side, side), np.float32)
    for picture, channel in np.ndindex(*channels.shape[:2]):
        image = Image.fromarray(channels[picture, channel]).resize((side, side), Image.Resampling.BICUBIC)
        resized[picture, channel] = image
    return torch.from_numpy(resized.clip(0, 255))
