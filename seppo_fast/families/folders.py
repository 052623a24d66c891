"""What is wrong with a model's folder, said before diffusers does: other formats, pickled weights, nothing there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from seppo_fast.errors import ConfigError

_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}

T = TypeVar("T")


def expanded(path: str) -> str:
    """`path` with a leading `~` replaced; a hub id stays what it is."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def check_place(key: str, path: str, converter: str) -> Path | None:
    """The folder that a key of the configuration names; None for a hub id.

    Args:
        key: `section.key`, for messages.
        path: its value.
        converter: the diffusers class whose `from_single_file` reads what is a single file.

    Raises:
        ConfigError: a single file, or nothing there and no hub id.
    """
    folder = Path(path)
    if folder.suffix in _UNSAFE_SUFFIXES or folder.suffix == ".safetensors":
        raise ConfigError(
            f"{key} = {path!r} is a single file; a diffusers folder is needed: "
            f"{converter}.from_single_file(FILE).save_pretrained(FOLDER) converts one you trust"
        )
    if not folder.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ConfigError(f"{key} = {path!r} does not exist, and is no hub id (owner/name) either")
        return None
    return folder


def check_weights(key: str, path: str, folder: Path, part: str = "") -> None:
    """Raises ConfigError where `folder / part` holds no safetensors weights; pickled ones are never loaded."""
    place = folder / part
    files = [file.name for file in place.glob("*")] if place.is_dir() else []
    if any(name.endswith(".safetensors") for name in files):
        return
    unsafe = [name for name in files if Path(name).suffix in _UNSAFE_SUFFIXES]
    if unsafe:
        raise ConfigError(
            f"{place / unsafe[0]}: pickled weights are not loaded, they can run code; load the model "
            "once where you trust it and save it with save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ConfigError(f"{key} = {path!r}: {part + '/' if part else 'it'} holds no safetensors weights")


def load_as(key: str, path: str, what: str, load: Callable[[], T]) -> T:
    """What `load` gives.

    Args:
        key: `section.key`, for messages.
        path: its value.
        what: it is to be loaded as.
        load: raises a dozen kinds of errors: diffusers', transformers', safetensors', the hub's.

    Raises:
        ConfigError: for any of them.
    """
    try:
        return load()
    except (MemoryError, torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{key} = {path!r} could not be loaded as {what} with safetensors weights: {reason}"
            + ("" if Path(path).exists() else " (is it in the local cache, or can the hub be reached?)")
        ) from error
