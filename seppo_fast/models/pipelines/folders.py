"""Checks of model folders with errors clearer than diffusers' own: wrong formats, pickled weights, missing files."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import nn

from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.files import home_expanded, read_json

# The names that diffusers and transformers give weight files: with or without a variant such as fp16, whole or sharded.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
# Parts of a pipeline that are not loaded: pictures are neither used as prompts nor shown to a safety checker.
UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")
_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}

T = TypeVar("T")


def expanded(path: str) -> str:
    """Returns `path` with a leading `~` expanded; raises ConfigError if it names an unknown user."""
    return str(home_expanded(path, ConfigError)) if path.startswith("~") else path


def check_place(key: str, path: str, converter: str) -> Path | None:
    """Returns the folder that a configuration key names; None if it names a hub id.

    Args:
        key: the key, as `section.key`, for messages.
        path: the key's value.
        converter: the diffusers class whose `from_single_file` loads a single file, for the message about one.

    Raises:
        ConfigError: The path is a single file, or it neither exists nor looks like a hub id.
    """
    folder = Path(path)
    if folder.suffix in _UNSAFE_SUFFIXES or folder.suffix == ".safetensors":
        raise ConfigError(
            f"{key} = {path!r} is a single file; a diffusers folder is needed: "
            f"{converter}.from_single_file(FILE).save_pretrained(FOLDER) converts a file that you trust"
        )
    if not folder.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise ConfigError(f"{key} = {path!r} does not exist, and is not a hub id (owner/name) either")
        return None
    return folder


def check_weights(key: str, path: str, folder: Path, part: str = "", loader: str = "DiffusionPipeline") -> None:
    """Raises ConfigError if `folder / part` holds no safetensors weights. Pickled weights are never loaded.

    Args:
        key: the key, as `section.key`, for messages.
        path: the key's value.
        folder: the model's folder.
        part: a folder in it; empty for the model's folder itself.
        loader: the diffusers class that loads the whole folder, for the message about pickled weights.
    """
    place = folder / part
    files = [file.name for file in place.glob("*")] if place.is_dir() else []
    for file in place.glob("*.safetensors.index*.json"):
        _check_index(key, file)
    if any(name.endswith(".safetensors") for name in files):
        return
    unsafe = [name for name in files if Path(name).suffix in _UNSAFE_SUFFIXES]
    if unsafe:
        raise ConfigError(
            f"{place / unsafe[0]}: pickled weights are not loaded, because they can run code. If you trust them: "
            f"{loader}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    raise ConfigError(f"{key} = {path!r}: {part + '/' if part else 'it'} holds no safetensors weights")


def variant_of(place: Path) -> str | None:
    """Returns the variant to load (such as fp16) from a folder that holds only variants of its weights; else None."""
    names = [_WEIGHTS.fullmatch(file.name) for file in place.glob("*.safetensors")] if place.is_dir() else []
    variants = {name["variant"] for name in names if name}
    if None in variants or not variants:
        return None
    return "fp16" if "fp16" in variants else min(variants)


def check_complete(key: str, place: Path, module: nn.Module) -> None:
    """Raises ConfigError if the files that a module was loaded from lack some of its weights.

    The libraries leave missing weights on `meta` or fill them with random numbers. For a folder, this compares the
    number of values, because names may be those of older versions. Only the files that were loaded are counted.
    """
    refuse_missing(key, place, type(module), [name for name, t in module.state_dict().items() if t.is_meta])
    if not place.is_dir():
        return
    held = 0
    for file in _loaded(place, module):
        with safe_open(file, framework="pt") as opened:
            held += sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    needed = sum(parameter.numel() for parameter in module.parameters())
    if held < needed:
        raise ConfigError(f"{key}: {place} holds only {held:,} of the {needed:,} weights that its config.json requires")


def refuse_missing(key: str, place: Path, kind: type[nn.Module], names: Collection[str]) -> None:
    """Raises ConfigError if weights are missing, which includes weights under names that the library does not know.

    Args:
        key: the key, as `section.key`, for messages.
        place: the folder or hub path that was searched.
        kind: the model's class.
        names: the names of the missing weights; may be empty.
    """
    if names:
        raise ConfigError(
            f"{key}: {place} lacks {len(names)} weights of {kind.__name__}, such as {min(names)}; to convert a file "
            "of another format, use the class's from_single_file(FILE).save_pretrained(FOLDER)"
        )


def _loaded(place: Path, module: nn.Module) -> list[Path]:
    """Returns the weight files that `from_pretrained` read from a folder.

    If a folder has both, diffusers prefers the index of sharded weights, and transformers the single file.
    """
    index_first = isinstance(module, ModelMixin)
    stem, variant = "diffusion_pytorch_model" if index_first else "model", variant_of(place)
    infix = "" if variant is None else f".{variant}"
    whole, index = place / f"{stem}{infix}.safetensors", place / f"{stem}.safetensors.index{infix}.json"
    if index.is_file() and (index_first or not whole.is_file()):
        return [place / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [whole] if whole.is_file() else []


def _check_index(key: str, file: Path) -> None:
    """Raises ConfigError if an index of sharded weights names anything but safetensors files in its own folder."""
    try:
        names = {str(name) for name in read_json(file)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(f"{key}: {file} cannot be read as an index of weights ({problem!r})") from problem
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{key}: {file} names {name!r}; only safetensors files beside it are loaded")


def check_parts(key: str, path: str, index: Mapping[str, Any]) -> None:
    """Refuses a pipeline whose `model_index.json` needs code from its own folder or from an unsupported library.

    Args:
        key: the key, as `section.key`, for messages.
        path: the key's value.
        index: the content of `model_index.json`.

    Raises:
        ConfigError: A part of the pipeline needs such code.
    """
    for name, part in index.items():
        if name.startswith("_") or not isinstance(part, (list, tuple)):
            continue
        library = part[0] if len(part) == 2 else part
        if name in UNNEEDED or library in (None, "diffusers", "transformers"):
            if (Path(path) / name / f"{library}.py").exists():
                raise ConfigError(f"{key} = {path!r}: {name}/{library}.py is code, which is never run; remove it")
            continue
        raise ConfigError(
            f"{key} = {path!r}: model_index.json loads {name} from {library!r}; only diffusers and transformers are "
            "supported, and code in a model's folder is never run"
        )


def load_as(key: str, path: str, what: str, load: Callable[[], T]) -> T:
    """Calls `load` and returns its result; turns the errors of the libraries into a ConfigError.

    Args:
        key: the key, as `section.key`, for messages.
        path: the key's value.
        what: what `load` loads, for messages.
        load: the function to call. It may raise any error of diffusers, transformers, safetensors or the hub.

    Raises:
        ConfigError: `load` raised an error other than one of memory.
    """
    try:
        return load()
    except (MemoryError, torch.OutOfMemoryError, ConfigError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "use_safetensors" in str(error):  # the libraries advise to remove this argument, which would load pickles
            raise ConfigError(
                f"{key} = {path!r} holds pickled weights for {what}, which are not loaded, because they can run code. "
                "If you trust them: DiffusionPipeline.from_pretrained(ID).save_pretrained(NEW_FOLDER, "
                "safe_serialization=True)"
            ) from error
        raise ConfigError(
            f"{key} = {path!r} could not be loaded as {what} with safetensors weights: {reason}"
            + ("" if Path(path).exists() else " (is the model in the local cache, and is the hub reachable?)")
        ) from error
