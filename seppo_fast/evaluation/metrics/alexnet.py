"""LPIPS: a perceptual distance of two pictures by the features of AlexNet with five linear heads (version 0.1).

Unverified on the true weights: only the arithmetic is tested, on random weights of the published shapes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seppo_fast.evaluation.metrics import keys
from seppo_fast.evaluation.metrics.networks import Shapes, add_units, load_network

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet, for values in [-1, 1]
_STRIDES = {
    "features.0": (4, 2),
    "features.3": (1, 2),
    "features.6": (1, 1),
    "features.8": (1, 1),
    "features.10": (1, 1),
}
_POOLED_BEFORE = ("features.3", "features.6")
SMALLEST = 31  # pixels; below, the second pooling has no input


class Lpips(nn.Module):
    """AlexNet's five ReLU outputs and a weight per channel for their squared differences; unverified on true weights.

    Zhang et al. 2018 (arXiv 1801.03924); details as in richzhang/PerceptualSimilarity (commit 0196579), version 0.1.
    """

    def __init__(self) -> None:
        super().__init__()
        add_units(self, keys.ALEXNET, lambda shape: nn.Conv2d(shape[1], shape[0], shape[2:]))  # type: ignore[arg-type]
        add_units(self, keys.HEADS, lambda shape: nn.Conv2d(shape[1], 1, 1, bias=False))

    def forward(self, x: Tensor, y: Tensor, spatial: bool = False) -> Tensor:
        """Maps two batches of pictures (N, 3, H, W) in [-1, 1] to distances (N,).

        Args:
            x: pictures.
            y: pictures of the same shape.
            spatial: average each layer's map after enlarging it to the pictures' size (bilinear), as the tool of the
                paper's video table does; the numbers differ slightly.
        """
        total = x.new_zeros(len(x))
        for head, a, b in zip(keys.HEADS, self.layers(x), self.layers(y)):
            difference = self.get_submodule(head)((_unit_length(a) - _unit_length(b)) ** 2)
            if spatial:
                difference = F.interpolate(difference, x.shape[2:], mode="bilinear", align_corners=False)
            total = total + difference.mean((1, 2, 3))
        return total

    def layers(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of the five ReLU layers for pictures (N, 3, H, W) in [-1, 1]."""
        shift, scale = (x.new_tensor(values).reshape(3, 1, 1) for values in (_SHIFT, _SCALE))
        x, outputs = (x - shift) / scale, []
        for name, (stride, padding) in _STRIDES.items():
            if name in _POOLED_BEFORE:
                x = F.max_pool2d(x, 3, 2)
            layer = self.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            x = F.relu(F.conv2d(x, layer.weight, layer.bias, stride, padding))
            outputs.append(x)
        return outputs


def load_lpips(alexnet: Path, heads: Path, device: torch.device) -> Lpips:
    """Loads the network from two safetensors files, torchvision's AlexNet and the heads.

    Raises:
        ConfigError: a file is missing, not safetensors, or holds other weights.
    """
    convolutions = {f"{name}.weight": shape for name, shape in keys.ALEXNET.items()}
    convolutions |= {f"{name}.bias": shape[:1] for name, shape in keys.ALEXNET.items()}
    weights = {f"{name}.weight": shape for name, shape in keys.HEADS.items()}
    files: dict[Path, tuple[Shapes, Shapes]] = {alexnet: (convolutions, keys.ALEXNET_UNUSED), heads: (weights, {})}
    return load_network(Lpips, files, "LPIPS", device)


def lpips(network: Lpips, a: np.ndarray, b: np.ndarray, *, spatial: bool = False, batch: int = 16) -> np.ndarray:
    """Computes the distance of each picture or clip to its reference; for clips, the mean over frames.

    Args:
        network: the network.
        a: pictures `(N, H, W, 3)` or clips `(N, F, H, W, 3)`, uint8, H and W at least 31.
        b: their references, of the same shape.
        spatial: see `Lpips.forward`.
        batch: pictures or frames per pass.

    Returns:
        `(N,)` float64, 0 for equal pictures.

    Raises:
        ValueError: the shapes differ or are others, the dtype is not uint8, or a side is too short.
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim not in (4, 5) or first.shape != second.shape or first.shape[-1] != 3 or first.size == 0:
        raise ValueError(
            f"a, b: expected two arrays of the same shape (N, H, W, 3) or (N, F, H, W, 3), got {first.shape} and "
            f"{second.shape}"
        )
    if first.dtype != np.uint8 or second.dtype != np.uint8 or min(first.shape[-3:-1]) < SMALLEST:
        raise ValueError(
            f"a, b: expected uint8 with sides of at least {SMALLEST} pixels, got {first.dtype}, {second.dtype} and "
            f"{first.shape[-3:-1]}"
        )
    device = next(network.parameters()).device
    x, y = (pictures.reshape(-1, *first.shape[-3:]) for pictures in (first, second))
    distances = []
    with torch.no_grad():
        for start in range(0, len(x), batch):
            pair = [torch.from_numpy(p[start : start + batch]).to(device).permute(0, 3, 1, 2) for p in (x, y)]
            distances.append(network(*(p.float() / 127.5 - 1 for p in pair), spatial).double().cpu().numpy())
    return np.concatenate(distances).reshape(len(first), -1).mean(axis=1)


def _unit_length(x: Tensor) -> Tensor:
    """Divides each pixel's features by their length; eps as published, so that a pixel without any stays zero."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
