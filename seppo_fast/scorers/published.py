"""What the published scorers share: checks, clips, finite scores, and digests of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BATCH = 64  # the most pictures in one forward pass

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


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file's content as hexadecimal digits."""
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
