"""The words that settings and the code behind them share, each written once."""

from __future__ import annotations

from typing import Literal

from seppo_fast._loss_arguments import Backend as Backend
from seppo_fast.loss import Flipper as Flipper

Draw = Literal["uniform", "newest", "initial"]
"""Which past policy is the reference."""
KeepRule = Literal["newest", "spread", "reservoir"]
"""Which past policies a bounded pool keeps."""
Attention = Literal["sdpa", "xformers"]
AttentionChoice = Literal["auto", "sdpa", "xformers"]
TemporalAttention = Literal["sdpa", "triton"]
LoraPlace = Literal["spatial", "motion", "both"]
