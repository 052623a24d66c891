"""How long a run will take, from the time of one forward."""

from __future__ import annotations

import time

import torch

from seppo_fast.capacity.plan import Need
from seppo_fast.config.schema import Config
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family

_LONG = 0.5  # seconds of a forward that are enough to go by
_BACKWARD = 2  # times the FLOP of a forward


def forwards_per_pair(config: Config) -> float:
    """Rows of the network that a run takes per learned pair, a backward counted as two: rollout, reference, policy."""
    objective = config.row
    guided = 2 if config.sampler.guidance > 1 else 1
    rolled_out = config.sampler.steps * guided / config.reference.uses if objective.negatives == "generated" else 0
    rows = 1 if objective.negatives is None else 2
    again = 1 if config.model.gradient_checkpointing else 0
    return rolled_out + rows * (1 + _BACKWARD + again + (1 if objective.draw else 0))


def seconds_of_run(config: Config, need: Need, family: Family, denoiser: Denoiser) -> float:
    """Seconds of all updates on one device, without saving and the cache: forwards of ever more rows are timed.

    Args:
        config: of the run.
        need: what it takes; no forward is larger than its batch.
        family: its model, whose network moves to the denoiser's device.
        denoiser: how it is called.
    """
    family.model.to(denoiser.device)
    most = need.batch * (2 if config.sampler.guidance > 1 else 1)
    rows, took = 1, _seconds(family, denoiser, config.data.resolution, 1)
    while took < _LONG and 2 * rows <= most:
        rows *= 2
        took = _seconds(family, denoiser, config.data.resolution, rows)
    pairs = config.train.updates * config.train.pairs_per_update
    return took / rows * pairs * forwards_per_pair(config)


def _seconds(family: Family, denoiser: Denoiser, resolution: int, rows: int) -> float:
    device = denoiser.device
    inputs = family.example_inputs(resolution)(rows)
    latents, times, conditioning = inputs[0].to(device), inputs[1].to(device), inputs[2].to(device)
    took = 0.0
    for _ in range(2):  # the first one loads and chooses kernels
        began = time.perf_counter()
        with torch.no_grad():
            # To the host, so that a GPU's work is waited for.
            denoiser.denoise(family.model, latents, times, conditioning).cpu()
        took = time.perf_counter() - began
    return took
