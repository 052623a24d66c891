"""The LAION aesthetic predictor v2, and the affine head that ImageReward has too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.scorers.clip import hub_towers
from seppo_fast.scorers.convert import Weights, read_weights, refuse_differences
from seppo_fast.scorers.published import PublishedScorer
from seppo_fast.scorers.resize import shorter_side

_WIDTHS = (1024, 128, 64, 16, 1)
_PLACES = (0, 2, 4, 6, 7)  # the published names count the dropouts between the layers, which only training uses


class AffineHead(nn.Module):
    """Five linear layers with no activation between them, so together an affine map to one number; float32.

    Args:
        weights: the published weights, `layers.0.weight` and so on, without a prefix.
        width: the size of the input.
        file: the file that they come from, for messages.

    Raises:
        ConfigError: weights are missing, unknown, or have other shapes.
    """

    def __init__(self, weights: Weights, width: int, file: Path) -> None:
        super().__init__()
        sizes = zip((width, *_WIDTHS), _WIDTHS)
        self.layers = nn.ModuleDict({str(place): nn.Linear(*size) for place, size in zip(_PLACES, sizes)})
        refuse_differences("head", {name: t.shape for name, t in self.state_dict().items()}, weights, file)
        self.load_state_dict(weights)
        self.eval().requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """Returns one number per row of features `(N, width)`, as `(N,)` float32."""
        hidden = features.float()
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden[:, 0]


def aesthetic(clip: dict[str, Path], head: Path, device: torch.device, dtype: torch.dtype) -> PublishedScorer:
    """Returns the LAION aesthetic score of a picture: 1 to 10, mostly 5 to 6. It ignores the prompts.

    The head is applied to CLIP ViT-L/14's image embedding of length 1. The original runs CLIP in float16 on a GPU.

    Source: christophschuhmann/improved-aesthetic-predictor 6934dd8, `simple_inference.py`.

    Args:
        clip: the CLIP's files by name.
        head: the head's converted weights.
        device: where the networks run.
        dtype: the dtype of CLIP; the head is float32.
    """
    towers = hub_towers(clip, partial(shorter_side, rounded=True), device, dtype)
    layers = AffineHead(read_weights(head), towers.width, head).to(device)

    def rate(prompts: Sequence[str], frames: np.ndarray) -> tuple[Tensor, int]:
        return layers(towers.image(frames)), 0

    return PublishedScorer("aesthetic", [clip["model.safetensors"], head], rate)
