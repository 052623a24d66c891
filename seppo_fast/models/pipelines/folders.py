"""What is wrong with a model's folder, said before diffusers does: other formats, pickled weights, nothing there."""

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

# diffusers' and transformers' names of weights: plain, or of a variant such as fp16; whole, or one of several files.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
# Parts of a pipeline that are not loaded: no picture is a prompt here, and none is shown to a safety checker.
UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")
_UNSAFE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}

T = TypeVar("T")


def expanded(path: str) -> str:
    """`path` with a leading `~` replaced; a hub id stays what it is. Raises ConfigError: there is no such user."""
    return str(home_expanded(path, ConfigError)) if path.startswith("~") else path


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


def check_weights(key: str, path: str, folder: Path, part: str = "", loader: str = "DiffusionPipeline") -> None:
    """Raises ConfigError where `folder / part` holds no safetensors weights; pickled ones are never loaded.

    Args:
        key: `section.key`, for messages.
        path: its value.
        folder: of the model.
        part: a folder in it.
        loader: the diffusers class that reads the whole folder.
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
            f"{place / unsafe[0]}: pickled weights are not loaded, they can run code. Where you trust them: "
            f"{loader}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, safe_serialization=True)"
        )
    raise ConfigError(f"{key} = {path!r}: {part + '/' if part else 'it'} holds no safetensors weights")


def variant_of(place: Path) -> str | None:
    """Returns the variant of weights, such as fp16, in a folder that holds none without one; else None."""
    names = [_WEIGHTS.fullmatch(file.name) for file in place.glob("*.safetensors")] if place.is_dir() else []
    variants = {name["variant"] for name in names if name}
    if None in variants or not variants:
        return None
    return "fp16" if "fp16" in variants else min(variants)


def check_complete(key: str, place: Path, module: nn.Module) -> None:
    """Raises ConfigError where weights of a module were not in the files that it was loaded from.

    What is missing there the libraries leave on `meta` or fill with random numbers. In a folder values are counted,
    since names may be old ones. Other files beside those that were loaded do not count.
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
        raise ConfigError(f"{key}: {place} holds {held:,} of the {needed:,} weights that its config.json asks for")


def refuse_missing(key: str, place: Path, kind: type[nn.Module], names: Collection[str]) -> None:
    """Raises ConfigError where weights of these names were not found, or only under names the library does not know.

    Args:
        key: `section.key`, for messages.
        place: where they were looked for.
        kind: the class of the model.
        names: of the missing weights.
    """
    if names:
        raise ConfigError(
            f"{key}: {place} holds nothing for {len(names)} weights of {kind.__name__}, such as {min(names)}; "
            "a file of another format is converted by its from_single_file(FILE).save_pretrained(FOLDER)"
        )


def _loaded(place: Path, module: nn.Module) -> list[Path]:
    """What `from_pretrained` took of a folder: of diffusers the index of split weights first, of transformers last."""
    index_first = isinstance(module, ModelMixin)
    stem, variant = "diffusion_pytorch_model" if index_first else "model", variant_of(place)
    infix = "" if variant is None else f".{variant}"
    whole, index = place / f"{stem}{infix}.safetensors", place / f"{stem}.safetensors.index{infix}.json"
    if index.is_file() and (index_first or not whole.is_file()):
        return [place / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [whole] if whole.is_file() else []


def _check_index(key: str, file: Path) -> None:
    """Raises ConfigError where an index of split weights names anything but safetensors files beside it."""
    try:
        names = {str(name) for name in read_json(file)["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ConfigError(f"{key}: {file} cannot be read as an index of weights ({problem!r})") from problem
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(f"{key}: {file} names {name!r}; only safetensors files beside it are loaded")


def check_parts(key: str, path: str, index: Mapping[str, Any]) -> None:
    """Refuses a pipeline whose `model_index.json` asks for code of its own, or of a library that we do not load from.

    Args:
        key: `section.key`, for messages.
        path: its value.
        index: the file's content.

    Raises:
        ConfigError: such a part.
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
            f"{key} = {path!r}: model_index.json takes {name} from {library!r}; only diffusers and transformers are "
            "used, and code in a model's folder is never run"
        )


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
        if "use_safetensors" in str(error):  # the libraries' advice is to leave it out
            raise ConfigError(
                f"{key} = {path!r} holds pickled weights for {what}, which are not loaded, they can run code. Where "
                "you trust them: DiffusionPipeline.from_pretrained(ID).save_pretrained(NEW_FOLDER, "
                "safe_serialization=True)"
            ) from error
        raise ConfigError(
            f"{key} = {path!r} could not be loaded as {what} with safetensors weights: {reason}"
            + ("" if Path(path).exists() else " (is it in the local cache, or can the hub be reached?)")
        ) from error
