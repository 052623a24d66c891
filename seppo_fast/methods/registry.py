"""The registry of training methods, by the name of their objective."""

from __future__ import annotations

from collections.abc import Callable

from seppo_fast.config.objectives import OBJECTIVES, Objective
from seppo_fast.methods.labelled.kto import KtoMethod
from seppo_fast.methods.labelled.mapo import MapoMethod
from seppo_fast.methods.labelled.rpo import RpoMethod
from seppo_fast.methods.method import Method
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.preference import PreferenceMethod
from seppo_fast.methods.replay.ditto import DittoMethod
from seppo_fast.methods.reverse.d3po import D3poMethod
from seppo_fast.methods.reverse.policy_gradient import DdpoMethod, GrpoMethod
from seppo_fast.methods.reverse.spo import SpoMethod
from seppo_fast.methods.rewards.judged import JudgedMethod
from seppo_fast.methods.rewards.nft import NftMethod

_METHODS: dict[str, Callable[[MethodParts], Method]] = {
    **dict.fromkeys(OBJECTIVES, PreferenceMethod),
    "seppo-judged": JudgedMethod,
    "ditto": DittoMethod,
    "diffusion-rpo": RpoMethod,
    "mapo": MapoMethod,
    "kto": KtoMethod,
    "ddpo": DdpoMethod,
    "grpo": GrpoMethod,
    "nft": NftMethod,
    "d3po": D3poMethod,
    "spo": SpoMethod,
}


def register(objective: str, row: Objective, method: Callable[[MethodParts], Method]) -> None:
    """Registers a training method under a new value of the configuration's `objective`, also from other packages.

    Args:
        objective: the new name.
        row: what the method needs: which reference is drawn, and what the data must hold.
        method: builds the method for a run.

    Raises:
        ValueError: the name is already registered.
    """
    if objective in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is already registered; choose another name")
    OBJECTIVES[objective] = row
    _METHODS[objective] = method


def method_of(parts: MethodParts) -> Method:
    """Builds the method that the run's configuration names in `objective`."""
    return _METHODS[parts.config.objective](parts)
