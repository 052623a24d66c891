"""The allowed values of settings that other modules use too, each defined once."""

from __future__ import annotations

from typing import Literal

from seppo_fast._loss_arguments import Backend as Backend
from seppo_fast.loss import Flipper as Flipper

Draw = Literal["uniform", "newest", "initial"]
"""Which past policy is the reference."""
KeepRule = Literal["newest", "spread", "reservoir"]
"""Which past policies a bounded pool keeps; see `seppo_fast.references.retention`."""
Attention = Literal["sdpa", "xformers"]
AttentionChoice = Literal["auto", "sdpa", "xformers"]
TemporalAttention = Literal["sdpa", "triton"]
LoraPlace = Literal["spatial", "motion", "both"]
