"""What the published scorers share: checks, clips, finite scores, digests of weights, the affine head."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.scorers.convert import Weights, refuse_differences, sha256

BATCH = 64  # the most pictures in one forward pass
_WIDTHS = (1024, 128, 64, 16, 1)
_PLACES = (0, 2, 4, 6, 7)  # the published names count the dropouts between the layers, which only training uses

Rate = Callable[[Sequence[str], np.ndarray], tuple[Tensor, int]]


class PublishedScorer:
    """A scorer with published weights. The score of a clip is the mean of its frames' scores.

    Attributes:
        cut: how many prompts of the last call were longer than the scorer's text limit, and were cut.

    Args:
        name: the scorer's name.
        files: the files of weights; their digest is the scorer's.
        rate: the scorer's arithmetic: from N prompts and N * F frames uint8, the F frames of a clip in a row, to the
            frames' scores `(N * F,)` and the number of cut prompts.
    """

    version = "1"
    higher_is_better = True

    def __init__(self, name: str, files: Sequence[Path], rate: Rate) -> None:
        self.name = name
        self.cut = 0
        self._files, self._rate = tuple(files), rate

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the weights' file; of the list of such digests, if there are several files."""
        digests = [sha256(file) for file in self._files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def __call__(self, prompts: Sequence[str], pictures: np.ndarray) -> np.ndarray:
        """See `Scorer`; in addition to its errors, ValueError names the rows whose score is non-finite."""
        check(prompts, pictures)
        if not len(prompts):
            self.cut = 0
            return np.zeros(0)
        with torch.inference_mode():
            scores, self.cut = self._rate(prompts, pictures.reshape(-1, *pictures.shape[-3:]))
        means = scores.double().cpu().numpy().reshape(len(prompts), -1).mean(axis=1)
        rows = np.flatnonzero(~np.isfinite(means)).tolist()
        if rows:
            shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
            raise ValueError(f"{self.name}: the score of row {shown} is non-finite; try float32 instead of a half type")
        return means


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


def check(prompts: Sequence[str], pictures: np.ndarray) -> None:
    """Raises ValueError unless pictures are `(N, H, W, 3)` or `(N, F, H, W, 3)` uint8 for N prompts, none empty."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts: expected a sequence of strings, got the string {prompts[:40]!r}")
    if not isinstance(pictures, np.ndarray) or pictures.dtype != np.uint8:
        kind = getattr(pictures, "dtype", type(pictures).__name__)
        raise ValueError(f"pictures: expected a uint8 array, got {kind}")
    shape = pictures.shape
    if len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape[1:]:
        raise ValueError(f"pictures: expected shape (N, H, W, 3) or (N, F, H, W, 3), got {shape}")
    if len(prompts) != len(pictures):
        raise ValueError(f"prompts: expected one per picture, got {len(prompts)} for {len(pictures)} pictures")


def fitted(ids: Sequence[Sequence[int]], limit: int, padding: int) -> tuple[Tensor, Tensor, int]:
    """Cuts and pads token ids to one length; a cut prompt keeps its last token, which ends the text.

    Args:
        ids: the tokens of each prompt, with those that begin and end it.
        limit: the length of the result.
        padding: the id to pad with.

    Returns:
        Token ids `(N, limit)` int64; the mask of real tokens `(N, limit)` int64; the number of cut prompts.
    """
    cut = [[*row[: limit - 1], row[-1]] if len(row) > limit else list(row) for row in ids]
    tokens = torch.tensor([row + [padding] * (limit - len(row)) for row in cut])
    mask = torch.tensor([[1] * len(row) + [0] * (limit - len(row)) for row in cut])
    return tokens, mask, sum(len(row) > limit for row in ids)
