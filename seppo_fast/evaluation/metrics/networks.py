"""What the feature networks share: reading published weights, named units, batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from seppo_fast.utils.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
Network = TypeVar("Network", bound=nn.Module)
_COUNTER = ".num_batches_tracked"  # in some files, beside each batch normalisation; not used


class Unit(nn.Module):
    """A convolution without bias, batch normalisation (eps 1e-3) with the stored statistics, and ReLU.

    Args:
        shape: the shape (out, in, *kernel) of the convolution's weight; two kernel sizes for pictures, three for clips.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        out, into, *kernel = shape
        self.kernel = tuple(kernel)
        if len(kernel) == 2:
            self.conv = nn.Conv2d(into, out, (kernel[0], kernel[1]), bias=False)
            self.bn: nn.BatchNorm2d | nn.BatchNorm3d = nn.BatchNorm2d(out, eps=1e-3)
        else:
            self.conv3d = nn.Conv3d(into, out, (kernel[0], kernel[1], kernel[2]), bias=False)
            self.bn = nn.BatchNorm3d(out, eps=1e-3)
        self.bn.num_batches_tracked = None  # not in all files, and used in training alone

    def forward(self, x: Tensor, stride: int = 1, padding: tuple[int, ...] | None = None) -> Tensor:
        """Applies the unit to (N, in, H, W) or (N, in, F, H, W); without `padding`, odd kernels are centred."""
        if padding is None:
            padding = tuple(size // 2 for size in self.kernel)
        if len(self.kernel) == 2:
            x = F.conv2d(x, self.conv.weight, stride=stride, padding=padding)
        else:
            x = F.conv3d(x, self.conv3d.weight, stride=stride, padding=padding)
        return F.relu(self.bn(x))


def add_units(root: nn.Module, shapes: Shapes, make: Callable[[tuple[int, ...]], nn.Module]) -> None:
    """Adds `make(shape)` to `root` under each dotted name, with plain modules between."""
    for name, shape in shapes.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, make(shape))


def load_network(
    make: Callable[[], Network], files: Mapping[Path, tuple[Shapes, Shapes]], what: str, device: torch.device
) -> Network:
    """Builds a network for evaluation, in float32, from the published weights.

    Args:
        make: builds the network; it is called on the meta device, so nothing is initialised at random.
        files: for each safetensors file, the shapes of the weights that it must hold, and of those that it may hold
            and that are not used.
        what: the network's name, for messages.
        device: the device to load to.

    Raises:
        ConfigError: as `read_weights`.
    """
    weights: dict[str, Tensor] = {}
    for file, (needed, unused) in files.items():
        weights |= read_weights(file, needed, unused, what)
    with torch.device("meta"):
        network = make()
    # strict is checked by `read_weights`; torch's own check would miss the batch counters.
    network.load_state_dict(weights, strict=False, assign=True)
    return network.eval().requires_grad_(False).to(device)


def read_weights(file: Path, needed: Shapes, unused: Shapes, what: str) -> dict[str, Tensor]:
    """Reads the weights of a safetensors file as float32 on the CPU.

    Raises:
        ConfigError: the file does not exist, is a pickle or not safetensors, lacks a weight, or holds one that is
            unknown or has another shape; the message names it.
    """
    if not file.is_file():
        raise ConfigError(f"{what}: {file} does not exist; docs/metrics.md names the published file and its conversion")
    if file.suffix != ".safetensors":
        raise ConfigError(
            f"{what}: {file} is not a safetensors file; pickles and TorchScript can run code and are not loaded. "
            "Convert the file once, as described in docs/metrics.md"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            held = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            _check(file, held, needed, unused, what)
            return {name: opened.get_tensor(name).float() for name in needed}
    except (SafetensorError, OSError) as problem:
        raise ConfigError(f"{what}: {file} cannot be read as safetensors ({problem})") from problem


def in_batches(function: Callable[[np.ndarray], np.ndarray], pictures: np.ndarray, size: int) -> np.ndarray:
    """Returns `function` of `size` pictures at a time, concatenated; needs memory for one batch.

    Raises:
        ValueError: there are no pictures, or `size` is less than 1.
    """
    if len(pictures) == 0 or size < 1:
        raise ValueError(f"pictures, size: both must be at least 1, got {len(pictures)} and {size}")
    return np.concatenate([function(pictures[start : start + size]) for start in range(0, len(pictures), size)])


def check_pictures(pictures: np.ndarray, dims: int) -> None:
    """Raises ValueError unless `pictures` is uint8 (N, H, W, 3) for 4 dimensions, or (N, F, H, W, 3) for 5."""
    form = {4: "(N, H, W, 3)", 5: "(N, F, H, W, 3)"}[dims]
    if pictures.ndim != dims or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"pictures: expected uint8 {form}, got {pictures.dtype} {pictures.shape}")


def _check(file: Path, held: Shapes, needed: Shapes, unused: Shapes, what: str) -> None:
    known = {**needed, **unused}
    missing = [name for name in needed if name not in held]
    surplus = [name for name in held if name not in known and not name.endswith(_COUNTER)]
    if missing:
        raise ConfigError(f"{what}: {file} lacks {len(missing)} weights, the first is {missing[0]!r}")
    if surplus:
        raise ConfigError(f"{what}: {file} holds {len(surplus)} unknown weights, the first is {surplus[0]!r}")
    for name in held.keys() & known.keys():
        if held[name] != known[name]:
            raise ConfigError(f"{what}: {name!r} in {file} has shape {held[name]}, expected {known[name]}")
