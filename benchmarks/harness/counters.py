"""What is counted rather than timed: FLOP, kernel launches, waits for the device, device memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import cache

import torch
from diffusers import AutoencoderKL, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTokenizer

from benchmarks.harness.measure import Machine
from seppo_fast import shapes
from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.trainable import make_trainable
from seppo_fast.models.unet import UNetFamily

SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # its UNet; all else is diffusers' default
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}

_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")  # the CUDA calls' own names, in the profiler's list


def count_flops(call: Callable[[], object]) -> float:
    """FLOP of matrix products, convolutions and attention, two a multiply-add, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def unet_flops(
    model: str,
    train: ModelConfig | None = None,
    motion_adapter: str = "",
    frames: int | None = None,
    resolution: int | None = None,
) -> float:
    """FLOP of a pipeline's UNet for one latent: forward, or with `train` forward and backward of what that trains.

    Counted on a copy without memory (device `meta`), so any size costs nothing, and no attention backend hides
    its products. Recomputed activations are not counted: MFU is about useful work.

    Args:
        model: folder of the pipeline, or `shapes`.
        train: what is trained.
        motion_adapter: folder of the motion modules that the UNet gets.
        frames: of the latent, with motion modules; None: it is a picture's.
        resolution: of its pictures in pixels; None: what the UNet was made for.
    """
    if train is not None:  # of what changes nothing here one value, so that equal work is counted once
        plain = {"precision": "fp32", "gradient_checkpointing": False, "compile": None, "attention": "auto"}
        train = train.model_copy(update=plain)
    return _counted(model, train, motion_adapter, frames, resolution)


@cache
def _counted(
    model: str, train: ModelConfig | None, motion_adapter: str, frames: int | None, resolution: int | None
) -> float:
    folder = str(shapes.PIPELINE) if model == "shapes" else model
    tokens = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer").model_max_length
    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae = AutoencoderKL.load_config(folder, subfolder="vae")
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    size = config["sample_size"] if resolution is None else resolution // downscale
    clip = () if frames is None else (frames,)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        if motion_adapter:
            adapter = MotionAdapter.from_config(MotionAdapter.load_config(motion_adapter))
            unet = UNetMotionModel.from_unet2d(unet, adapter)
        latents = torch.empty(1, config["in_channels"], *clip, size, size)
        timesteps = torch.empty(1, dtype=torch.int64)
        embeds = torch.empty(frames or 1, tokens, config["cross_attention_dim"])
        if train is None:
            with torch.no_grad():
                return count_flops(lambda: unet(latents, timesteps, embeds))
        make_trainable(unet, train, 0, UNetFamily)
        return count_flops(lambda: unet(latents, timesteps, embeds).sample.sum().backward())


def launches(machine: Machine, call: Callable[[], object]) -> int | None:
    """Kernels and CUDA graphs that the host launched, by the profiler; None without a GPU."""
    if machine.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # the CPU's operators would fill gigabytes
        call()
        machine.synchronize()
    return sum(event.name.startswith(_LAUNCHES) for event in profiler.events())


def host_syncs(machine: Machine, call: Callable[[], object]) -> int | None:
    """How often the host waited for the device (a copy to the host, `.item()`, ...); None without a GPU."""
    if machine.device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def allocated(machine: Machine) -> int:
    """Bytes of device memory in use; 0 without a GPU."""
    if machine.device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(machine.device)


def peak_bytes(machine: Machine, call: Callable[[], object], others: int) -> int | None:
    """Peak of device memory during a call, less what `others` hold; None without a GPU."""
    if machine.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(machine.device)
    call()
    machine.synchronize()
    return torch.cuda.max_memory_allocated(machine.device) - others
