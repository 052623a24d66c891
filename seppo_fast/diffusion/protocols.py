"""Sampling settings of published evaluations, selected by name with `seppo-fast score --protocol`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplingProtocol:
    """The sampling settings of a published evaluation; None keeps the run's own setting.

    Attributes:
        source: who evaluates with these settings.
        sampler: values of `SamplerConfig`, by field.
        resolution: the side of a picture in pixels.
        precision: the compute dtype, as `model.precision`.
    """

    source: str
    sampler: Mapping[str, Any]
    resolution: int | None = None
    precision: str | None = None


PROTOCOLS = {
    "run": SamplingProtocol("the run's own sampler", {}),
    "paper": SamplingProtocol(
        "SePPO: SD-1.5's default pipeline, PNDM with 50 steps (51 evaluations), guidance 7.5, 512 pixels, float16",
        {"name": "pndm", "steps": 50, "guidance": 7.5},
        512,
        "fp16",
    ),
    "sdpo": SamplingProtocol(
        "Diffusion-SDPO's scripts: Euler with 50 steps, guidance 7.5",
        {"name": "euler", "steps": 50, "guidance": 7.5},
    ),
    "spo": SamplingProtocol(
        "SPO's scripts: DDIM with 20 steps, guidance 5", {"name": "ddim", "steps": 20, "guidance": 5.0}
    ),
}
