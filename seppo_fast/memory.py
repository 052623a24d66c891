"""How much memory is free, and how much a batch takes: what batch sizes are chosen from.

A batch's bytes are counted, not guessed: a copy of the model runs forward (and backward) on fake tensors, which have
shapes and storages but no data, while the storages that come and go are added up. That takes seconds, next to no
memory, and no GPU, and it leaves the model alone. What an allocator wastes and a kernel's scratch space are not seen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import mmap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from seppo_fast.families import UNet

# A footprint is counted at these two numbers of rows.
_FEW, _MANY = 1, 256

FamilyDenoise = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""How a family calls its UNet: (unet, latents (B, *latent), timesteps (B,), prompt_embeds (B, L, D)) -> prediction"""


def call_plainly(unet: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    """The prediction of a UNet that takes one embedding a row, as those for pictures do."""
    return unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


@dataclass(frozen=True)
class Footprint:
    """Bytes that the tensors made in a call take at their peak: `fixed + rows * per_row`.

    Each moment of a call holds some bytes that do not depend on the rows and some that grow with them, and the peak is
    the greatest of these lines. So it is convex in the rows, and the line through the peaks at 1 and at 256 rows is
    exact there and nowhere too low between.

    Attributes:
        fixed: gradients, and casts of weights.
        per_row: activations, mostly.
    """

    fixed: int
    per_row: int

    def largest(self, budget: int, cap: int) -> int:
        """The largest power of two of rows, at most `cap`, that fits into `budget` bytes; 0 where not even one does."""
        rows, following = 0, 1
        while following <= cap and self.fixed + following * self.per_row <= budget:
            rows, following = following, 2 * following
        return rows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is spent, the host's or the device's. On a CPU torch says so in words only."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "can't allocate memory" in said or "out of memory" in said
    )


def free_bytes(
    device: torch.device, cgroup: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes that new tensors on `device` may take.

    On CUDA, what the driver has left and what PyTorch's allocator holds unused. On the CPU, the RAM that is available,
    or what the memory limits of this process's cgroups leave, where that is less.

    Args:
        device: CUDA or CPU.
        cgroup: Linux's list of the cgroups of this process; need not exist.
        mounts: where these are mounted.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    groups = cgroup.read_text().splitlines() if cgroup.is_file() else []
    rooms = [room for group in groups for room in _cgroup_rooms(group, mounts)]
    return max(0, min([psutil.virtual_memory().available, *rooms]))


def host_bytes(size: int) -> Tensor:
    """Host memory `(size,)` uint8, zeros: exactly so many bytes, where PyTorch's pinned ones are a power of two."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def page_locked(memory: Tensor) -> Tensor:
    """The same host memory, registered with the driver for as long as this tensor object lives.

    Raises:
        RuntimeError: the driver refuses.
    """
    place = memory.data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(place, memory.nbytes, 0))
    if code:
        # The runtime keeps the error, and the next launch of a kernel would raise it in its place: take it here.
        with contextlib.suppress(RuntimeError):
            torch.empty(1, device="cuda").fill_(0)
        torch.cuda.check_error(code)
    weakref.finalize(memory, lambda: torch.cuda.cudart().cudaHostUnregister(place))
    return memory


def training_footprint(
    unet: UNet,
    latent_shape: tuple[int, ...],
    prompt_shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    denoise: FamilyDenoise = call_plainly,
) -> Footprint:
    """What a micro-batch of the learner takes; a row is a pair: two latents forward, and backward.

    Gradients of the trained weights are there from the start, as in every micro-batch but the first. The weights and
    the optimizer's state are not counted. Attention counts as one fused kernel, whatever the backend.

    Args:
        unet: as it will be trained: trained weights marked, checkpointing and memory format set.
        latent_shape: (C, H, W), or (C, F, H, W).
        prompt_shape: (L, D), tokens and width of the embedding of a prompt.
        dtype: of the computation; float32 runs without autocast.
        device: where it will run. Autocast on CUDA keeps more in float32 than on the CPU.
        denoise: how the UNet is called.
    """

    def call(model: nn.Module, rows: int) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        latents, timesteps, embeds = _inputs(2 * rows, latent_shape, prompt_shape)
        target = torch.empty_like(latents)
        with _autocast(dtype):
            prediction = denoise(model, latents, timesteps, embeds)
        (prediction.float() - target).square().mean().backward()

    return _footprint(unet, call, device)


def sampling_footprint(
    unet: UNet,
    latent_shape: tuple[int, ...],
    prompt_shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    guided: bool,
    denoise: FamilyDenoise = call_plainly,
) -> Footprint:
    """What a batch of samples takes; a row is one latent, which is two rows of the UNet where it is guided.

    Args:
        unet: as in `training_footprint`, like the other arguments.
        latent_shape: (C, H, W), or (C, F, H, W).
        prompt_shape: (L, D).
        dtype: of the computation.
        device: where it will run.
        guided: with classifier-free guidance, as one doubled batch.
        denoise: how the UNet is called.
    """

    def call(model: nn.Module, rows: int) -> None:
        inputs = _inputs(rows, latent_shape, prompt_shape)
        with torch.no_grad(), _autocast(dtype):
            latents, timesteps, embeds = (torch.cat([x, x]) for x in inputs) if guided else inputs
            denoise(model, latents, timesteps, embeds)

    return _footprint(unet, call, device)


def fake_copy(unet: UNet) -> UNet:
    """A copy without data, on the CPU, to be made and called under a `FakeTensorMode`; its attention is PyTorch's.

    Shapes, dtypes, memory format, adapters and the marks of trained weights are those of `unet`. Gradients and compiled
    calls are not copied.
    """
    tensors = itertools.chain(unet.parameters(), unet.buffers())
    fake = copy.deepcopy(unet, {id(tensor): _fake_like(tensor) for tensor in tensors})
    fake.set_attn_processor(AttnProcessor2_0())
    if fake.is_gradient_checkpointing:
        # By default it restores the state of the random generators, which is data.
        fake.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    return fake


def _fake_like(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _footprint(unet: UNet, call: Callable[[nn.Module, int], None], device: torch.device) -> Footprint:
    peaks = []
    with FakeTensorMode(), torch.enable_grad():
        model = fake_copy(unet)
        if device.type == "cuda":
            _follow_cuda(model)
        for rows in (_FEW, _MANY):
            with _LiveBytes(model) as live:
                call(model, rows)
            peaks.append(live.peak)
    per_row = -(-(peaks[1] - peaks[0]) // (_MANY - _FEW))
    return Footprint(fixed=peaks[0] - _FEW * per_row, per_row=per_row)


def _inputs(rows: int, latent_shape: tuple[int, ...], prompt_shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(rows, *latent_shape), torch.empty(rows, dtype=torch.int64), torch.empty(rows, *prompt_shape)


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def _follow_cuda(model: nn.Module) -> None:
    """Lets a fake model on the CPU do what CUDA does otherwise, where that costs memory.

    Autocast computes norms and nearest-neighbour upsampling in float32 there (of torch's list of such operations, what
    a UNet uses), and group norm copies channels_last to contiguous memory.
    """

    def prepare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x, *others = args or (kwargs.pop("hidden_states"),)
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        return (x.contiguous() if isinstance(module, nn.GroupNorm) else x, *others), kwargs

    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | Upsample2D):
            module.register_forward_pre_hook(prepare, with_kwargs=True)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make while it is on, each until it is freed.

    Args:
        model: its weights and buffers are not counted.

    Attributes:
        peak: the most bytes that were there at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:  # a view, or written in place
            return
        self._known.add(storage)
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._subtract, storage.nbytes()).atexit = False

    def _subtract(self, size: int) -> None:
        self._live -= size


def _cgroup_rooms(group: str, mounts: Path) -> Iterator[int]:
    """What the memory limits of a cgroup, and of those around it, leave, in bytes; nothing where there is no limit.

    Args:
        group: a line of /proc/self/cgroup: `0::/path` (v2), or `4:memory:/path` (v1).
        mounts: where cgroups are mounted.
    """
    _, controllers, path = group.split(":", 2)
    if not controllers:
        mount, limit, use, cache = mounts, "memory.max", "memory.current", "inactive_file"
    elif "memory" in controllers.split(","):
        mount, limit, use = mounts / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        cache = "total_inactive_file"
    else:
        return
    inner = PurePosixPath(path.lstrip("/"))
    # Within a container the path can be the host's, and only its root is there to be seen.
    for folder in (mount / part for part in (inner, *inner.parents)):
        if not (folder / limit).is_file() or (bound := (folder / limit).read_text().strip()) == "max":
            continue
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # The kernel drops file pages that nobody has used lately before it refuses memory.
        yield int(bound) - int((folder / use).read_text()) + int(stat[cache])
