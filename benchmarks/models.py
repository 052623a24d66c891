"""What benchmarks run: SD-1.5's architecture with random weights on a GPU, the embedded pipeline on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.measure import Machine
from seppo_fast import shapes
from seppo_fast.config import Config, parse_config

_SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip


def write_pipeline(folder: Path, toy: bool) -> int:
    """Writes a pipeline of random weights in the SD-1.5 format; returns the number of parameters of its UNet.

    The tokenizer is that of the embedded pipeline with 77 tokens: any whose ids fit serves.
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


def load_pipeline(model: str, dtype: torch.dtype, device: torch.device) -> StableDiffusionPipeline:
    """A pipeline folder (or `shapes`) as diffusers loads it, every part on the device in this dtype."""
    folder = str(shapes.PIPELINE) if model == "shapes" else model
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, dtype=dtype, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@dataclass(frozen=True)
class Workplace:
    """A model to run and a folder to write into.

    Attributes:
        model: folder of the pipeline, or `shapes`.
        resolution: of its pictures, in pixels.
        folder: for caches and runs; temporary.
        machine: where it runs.
    """

    model: str
    resolution: int
    folder: Path
    machine: Machine

    def config(self, *, memory: str = "balanced", **sections: dict[str, Any]) -> Config:
        """A training configuration of this model; `sections` go over what stands here.

        Prompts are not dropped, since which are is nothing that two loops need share.
        """
        tree: dict[str, dict[str, Any]] = {
            "model": {"path": self.model, "precision": self.machine.precision},
            "data": {"resolution": self.resolution, "prompt_dropout": 0.0, "cache": str(self.folder / "cache")},
            "log": {"sample_every": 0},
        }
        for name, section in sections.items():
            tree[name] = tree.get(name, {}) | section
        return parse_config({"output": str(self.folder / "run"), "memory": memory, **tree})


@contextmanager
def workplace(machine: Machine) -> Iterator[Workplace]:
    """The model for a machine; on a GPU 859.5 M random parameters are written first, 4.3 GB in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if machine.device.type == "cuda":
            torch.manual_seed(0)
            write_pipeline(folder / "pipeline", toy=False)
            yield Workplace(str(folder / "pipeline"), 512, folder, machine)
        else:
            yield Workplace("shapes", 32, folder, machine)
