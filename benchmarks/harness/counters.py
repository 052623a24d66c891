"""Counts what needs no timing: FLOP, kernel launches, host synchronizations, device memory."""

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

SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # SD-1.5's UNet; all other settings are diffusers' defaults
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}

_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")  # how the names of launching CUDA calls begin in the profiler


def count_flops(call: Callable[[], object]) -> float:
    """Returns the FLOP of matrix products, convolutions and attention, forward and backward; a multiply-add is two."""
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
    """Returns the FLOP of a pipeline's UNet for one latent: forward, or with `train` forward and backward.

    Counted on the device `meta`, so that any size costs nothing and no attention backend hides its products.
    Recomputed activations are not counted: MFU is about useful work.

    Args:
        model: folder of the pipeline, or `shapes`.
        train: configuration that says which weights are trained; None: only the forward is counted.
        motion_adapter: folder of the motion modules to add to the UNet; empty: none.
        frames: number of frames of the latent, with motion modules; None: the latent is a picture's.
        resolution: size of its pictures in pixels; None: the size that the UNet was made for.
    """
    if train is not None:  # unify settings that do not affect the count, so that equal work is counted once
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
    """Returns how many kernels and CUDA graphs the host launched, by the profiler; None without a GPU."""
    if machine.device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # recording CPU operators too would take gigabytes
        call()
        machine.synchronize()
    return sum(event.name.startswith(_LAUNCHES) for event in profiler.events())


def host_syncs(machine: Machine, call: Callable[[], object]) -> int | None:
    """Returns how often the host waited for the device (copies to the host, `.item()`, ...); None without a GPU."""
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
    """Returns the bytes of device memory in use; 0 without a GPU."""
    if machine.device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(machine.device)


def peak_bytes(machine: Machine, call: Callable[[], object], others: int) -> int | None:
    """Returns the peak bytes of device memory during a call, minus those that `others` hold; None without a GPU."""
    if machine.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(machine.device)
    call()
    machine.synchronize()
    return torch.cuda.max_memory_allocated(machine.device) - others
