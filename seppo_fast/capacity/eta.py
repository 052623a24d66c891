"""Estimates a run's duration by timing a few forwards."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from seppo_fast.capacity.plan import Need
from seppo_fast.capacity.work import decodes_per_pair, forwards_per_pair, guided_rows
from seppo_fast.config.schema import Config
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family

_LONG = 0.5  # seconds; a forward that takes this long is representative


def seconds_of_run(config: Config, need: Need, family: Family, denoiser: Denoiser) -> float:
    """Estimates the seconds of all updates on one device, excluding the time to fill the cache and to save states.

    Times forwards with growing batches, with `sampler.round_trip` also decoding and encoding samples, and with a scorer
    also decoding what it sees. The scorer's own time is not included.

    Args:
        config: the run's configuration.
        need: the run's memory needs; no timed forward has more rows than a sampling step of `need.batch` samples.
        family: the model family, whose network is moved to the denoiser's device.
        denoiser: runs the network.
    """
    device = denoiser.device
    family.model.to(device)
    inputs = family.example_inputs(config.data.resolution)

    def forward(rows: int) -> Callable[[], object]:
        shown = inputs(rows)
        latents, times, conditioning = shown[0].to(device), shown[1].to(device), shown[2].to(device)
        # A copy to the host, because it waits until a GPU has finished.
        return lambda: denoiser.denoise(family.model, latents, times, conditioning).cpu()

    def round_trip(rows: int) -> Callable[[], object]:
        latents = inputs(rows)[0]
        return lambda: denoiser.through_pixels(latents)

    def decode(rows: int) -> Callable[[], object]:
        latents = inputs(rows)[0]

        def decode_and_park() -> None:
            family.decode(latents)
            family.park_encoders()

        return decode_and_park

    per_pair = forwards_per_pair(config) * _seconds_a_row(forward, need.batch * guided_rows(config))
    if config.sampler.round_trip:
        per_pair += _seconds_a_row(round_trip, need.batch) / config.reference.uses
    if config.scorer is not None:
        per_pair += decodes_per_pair(config) * _seconds_a_row(decode, need.batch)
    return config.train.updates * config.train.pairs_per_update * per_pair


def _seconds_a_row(call: Callable[[int], Callable[[], object]], most: int) -> float:
    """Returns a call's seconds per row. The rows are doubled, up to `most`, until a call takes at least `_LONG`."""
    rows, took = 1, _seconds(call(1))
    while took < _LONG and 2 * rows <= most:
        rows *= 2
        took = _seconds(call(rows))
    return took / rows


def _seconds(call: Callable[[], object]) -> float:
    took = 0.0
    for _ in range(2):  # the first call loads and selects kernels
        began = time.perf_counter()
        with torch.no_grad():
            call()
        took = time.perf_counter() - began
    return took
