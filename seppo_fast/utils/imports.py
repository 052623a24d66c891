"""Functions of the user's own, given as `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from seppo_fast.utils.errors import ConfigError


def import_function(name: str, what: str) -> Callable[..., Any]:
    """Imports the function that `module:function` names.

    Args:
        name: the module and the function, both non-empty.
        what: what the message calls it, such as a flag with its value.

    Raises:
        ConfigError: it cannot be imported, or cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        imported = getattr(importlib.import_module(module), function)
    except Exception as problem:  # importing a module runs it, so it can raise anything
        raise ConfigError(f"{what} cannot be imported: {type(problem).__name__}: {problem}") from problem
    if not callable(imported):
        raise ConfigError(f"{what} is a {type(imported).__name__} and cannot be called")
    return imported  # type: ignore[no-any-return]
