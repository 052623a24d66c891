"""Random weights for the feature networks, in the published shapes."""

import math

import torch


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Returns weights with which a signal keeps its size, and positive variances."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            values *= math.sqrt(2 / math.prod(shape[1:]))
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.1 * values.abs()
        else:
            values *= 0.1
        weights[name] = values
    return weights
