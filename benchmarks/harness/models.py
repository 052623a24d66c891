"""The models that benchmarks run: SD-1.5's architecture with random weights on a GPU, a small pipeline on a CPU.

The small pipeline is the one embedded in the package, `seppo_fast.shapes.PIPELINE`. For clips, motion modules with
random weights are added to either UNet; on a GPU they have the architecture of AnimateDiff's modules for SD-1.5.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.harness.cases import Shared
from benchmarks.harness.counters import unet_flops
from benchmarks.harness.estimates import WRITE_ADAPTER, WRITE_PIPELINE
from benchmarks.harness.measure import Machine
from seppo_fast import shapes
from seppo_fast.config.load import parse_config
from seppo_fast.config.schema import Config, ModelConfig
from seppo_fast.data.examples import Example
from seppo_fast.data.media.clips import load_clip
from seppo_fast.data.media.images import load_image

Module = TypeVar("Module", bound=nn.Module)

_SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
# From diffusers' AnimateDiff documentation. Not imported from our AnimateDiff family, so that an error there is found.
_CLIP_SCHEDULE = {
    "beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "linspace", "steps_offset": 1,
}  # fmt: skip


def write_pipeline(folder: Path, toy: bool) -> int:
    """Writes a pipeline with random weights in the SD-1.5 format; returns the number of parameters of its UNet.

    The tokenizer is the embedded pipeline's, with a maximum length of 77; any tokenizer whose ids are below the text
    encoder's `vocab_size` would do.
    """
    widths, text_width, layers = ((32, 64, 64, 64), 64, 1) if toy else ((320, 640, 1280, 1280), 768, 12)
    vae_widths = (8, 16, 16, 16) if toy else (128, 256, 512, 512)
    groups = 8 if toy else 32
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, cross_attention_dim=text_width, norm_num_groups=groups
    )
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=groups,
        sample_size=512,
    )
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=text_width, intermediate_size=4 * text_width, num_hidden_layers=layers,
        num_attention_heads=text_width // 64, max_position_embeddings=77,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=DDIMScheduler(**_SCHEDULE),
        tokenizer=CLIPTokenizer.from_pretrained(shapes.PIPELINE / "tokenizer", model_max_length=77),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return sum(parameter.numel() for parameter in unet.parameters())


def write_adapter(folder: Path, pipeline: Path) -> int:
    """Writes motion modules with random weights that fit a pipeline folder's UNet; returns the number of parameters.

    For SD-1.5 they have the architecture of AnimateDiff's v1-5-2: 8 attention heads, at most 32 frames, and a motion
    module in the UNet's middle block too.
    """
    unet = UNet2DConditionModel.load_config(pipeline, subfolder="unet")
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=tuple(unet["block_out_channels"]),
        motion_layers_per_block=unet["layers_per_block"],
        motion_norm_num_groups=unet["norm_num_groups"],
        motion_num_attention_heads=8,
        motion_max_seq_length=32,
        use_motion_mid_block=True,
    )
    for name, weight in adapter.named_parameters():
        if name.endswith("proj_out.weight"):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)  # zero by default: the modules would do nothing
    adapter.save_pretrained(folder)
    return sum(parameter.numel() for parameter in adapter.parameters())


def load_pipeline(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    """Loads the pipeline that a configuration trains, using diffusers alone; all parts are in `dtype` on `device`."""
    folder = str(shapes.PIPELINE) if model.path == "shapes" else model.path
    if model.motion_adapter:
        parts = _clip_pipeline(folder, model.motion_adapter).components
        pipe = AnimateDiffPipeline(**{name: copy.deepcopy(part) for name, part in parts.items()}).to(dtype)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@lru_cache(maxsize=1)
def _clip_pipeline(folder: str, adapter: str) -> AnimateDiffPipeline:
    """Loads an AnimateDiff pipeline in float32 on the CPU; cached: assembling 1.3 billion parameters takes seconds."""
    pipe = AnimateDiffPipeline.from_pretrained(
        folder,
        motion_adapter=MotionAdapter.from_pretrained(adapter),
        scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler", **_CLIP_SCHEDULE),
    )
    pipe.register_modules(motion_adapter=None)  # the UNet holds the modules now
    return pipe


def load_pixels(example: Example, config: Config) -> np.ndarray:
    """Returns an example's winner, decoded as for the data cache: uint8 (H, W, 3), or (F, H, W, 3) for a clip."""
    image, data = example.image, config.data
    if not config.model.motion_adapter:
        return load_image(image, data.resolution)
    return load_clip(example, image.name, image.open(), data.resolution, data.frames, data.flip).pixels


@dataclass(frozen=True)
class Workplace:
    """A model to run and a folder to write into.

    Attributes:
        model: folder of the pipeline, or `shapes`.
        resolution: size of its pictures in pixels.
        folder: temporary folder for caches and runs.
        machine: the machine that the model runs on.
        motion_adapter: folder of its motion modules; empty for pictures.
        frames: number of frames per clip; None for pictures.
    """

    model: str
    resolution: int
    folder: Path
    machine: Machine
    motion_adapter: str = ""
    frames: int | None = None

    def source(self, count: int) -> str:
        """Returns the `data.source` of `count` embedded examples: clips if the model generates clips, else pictures."""
        return f"shapes{'' if self.frames is None else '-motion'}:{count}:11"

    def flops(self, train: ModelConfig | None = None) -> float:
        """Returns the FLOP of the UNet for one latent; see `unet_flops`, also for `train`."""
        return unet_flops(self.model, train, self.motion_adapter, self.frames, self.resolution)

    def config(self, *, memory: str = "balanced", **sections: dict[str, Any]) -> Config:
        """Returns a training configuration for this model; `sections` override the settings made here.

        Prompt dropout is off; otherwise, the compared loops would have to drop the same prompts.
        """
        tree: dict[str, dict[str, Any]] = {
            "model": {"path": self.model, "precision": self.machine.precision},
            "data": {"resolution": self.resolution, "prompt_dropout": 0.0, "cache": str(self.folder / "cache")},
            "train": {"warmup_updates": 0},  # the naive loop has no warmup
            "log": {"sample_every": 0, "health_every": 0},
        }
        if self.frames is not None:
            tree["model"]["motion_adapter"], tree["data"]["frames"] = self.motion_adapter, self.frames
        for name, section in sections.items():
            tree[name] = tree.get(name, {}) | section
        return parse_config({"output": str(self.folder / "run"), "memory": memory, **tree})


@contextmanager
def workplace(machine: Machine, frames: int | None = None) -> Iterator[Workplace]:
    """Provides a workplace for a machine; its model generates clips of `frames` frames, or pictures if that is None.

    On a GPU, the pipeline is first written to a temporary folder with random weights: 4.3 GB; its UNet has 859.5 M
    parameters. For clips, the motion modules are written too: another 453.2 M parameters, 1.8 GB.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = Workplace("shapes", 32, folder, machine)
        if machine.device.type == "cuda":
            torch.manual_seed(0)
            write_pipeline(folder / "pipeline", toy=False)
            place = Workplace(str(folder / "pipeline"), 512, folder, machine)
        if frames is not None:
            pipeline = shapes.PIPELINE if place.model == "shapes" else Path(place.model)
            write_adapter(folder / "adapter", pipeline)
            place = replace(place, motion_adapter=str(folder / "adapter"), frames=frames)
        yield place


def shared_workplace(machine: Machine, frames: int | None = None) -> Shared[Workplace]:
    """Returns a set-up that opens a `workplace` when the first of a suite's cases needs it."""
    seconds = WRITE_PIPELINE + (0.0 if frames is None else WRITE_ADAPTER)
    return Shared(lambda stack: stack.enter_context(workplace(machine, frames)), seconds)


def second(module: Module) -> Module:
    """Returns a copy of a module that has its own trainable weights and shares the frozen ones."""
    frozen = {id(weight): weight for weight in module.parameters() if not weight.requires_grad}
    return copy.deepcopy(module, frozen)
