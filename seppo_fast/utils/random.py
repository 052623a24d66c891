"""The random numbers of a run.

Each one is a pure function of (seed, purpose, key), where the key is usually (update, sample id), drawn on the CPU from
a counter-based generator. So a run trains on the same pairs on any device, with any number of processes and any split
into micro-batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keyed_rng(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Returns a generator that depends on (seed, purpose, key) alone; torch's CPU generator uses only 32 seed bits."""
    numbers = int(seed), purpose, *(int(number) for number in key)  # the repr of numpy integers differs from Python's
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def keyed_noise(seed: int, purpose: str, keys: Sequence[Sequence[int]], latent_shape: Sequence[int]) -> Tensor:
    """Returns standard normal noise `(B, *latent)`, float32 on the CPU, from one independent stream per key."""
    draws = [keyed_rng(seed, purpose, *key).standard_normal(latent_shape, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(draws))
