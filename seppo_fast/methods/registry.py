"""The training methods by the names of their objectives."""

from __future__ import annotations

from collections.abc import Callable

from seppo_fast.config.objectives import OBJECTIVES, Objective
from seppo_fast.methods.method import Method
from seppo_fast.methods.parts import MethodParts
from seppo_fast.methods.preference import PreferenceMethod

_METHODS: dict[str, Callable[[MethodParts], Method]] = dict.fromkeys(OBJECTIVES, PreferenceMethod)


def register(objective: str, row: Objective, method: Callable[[MethodParts], Method]) -> None:
    """Makes a method known by the name that `objective` has in a configuration; for code outside this package too.

    Args:
        objective: a new name.
        row: what the method needs of data and references.
        method: makes it for a run.

    Raises:
        ValueError: the name is taken.
    """
    if objective in OBJECTIVES:
        raise ValueError(f"objective: {objective!r} is taken")
    OBJECTIVES[objective] = row
    _METHODS[objective] = method


def method_of(parts: MethodParts) -> Method:
    """Returns the method that the configuration of a run asks for."""
    return _METHODS[parts.config.objective](parts)
