"""The common base of the families whose network is a UNet of diffusers, for pictures or with motion modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    Transformer2DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import convert_state_dict_to_kohya
from torch import Tensor, nn

from seppo_fast.config.schema import SamplerConfig
from seppo_fast.config.vocabulary import Attention, AttentionChoice, LoraPlace, TemporalAttention
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import DiffusionSolver
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.diffusion.steps import Step, reverse_steps
from seppo_fast.models.attention import choose_attention, set_attention
from seppo_fast.models.encoders import PROMPT_EMBEDS, ClipText, PictureVae, digest_of_parts
from seppo_fast.models.fake import UNet
from seppo_fast.models.family import Coder, Family, JointParts
from seppo_fast.models.temporal_attention import set_temporal_attention
from seppo_fast.utils.errors import ConfigError

_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_MOTION = "motion_modules"  # part of the name of every module inside a motion module
_RESIDUAL = (ResnetBlock2D, Transformer2DModel, AnimateDiffTransformer3D)


class UNetFamily(Family):
    """A diffusers pipeline with a UNet, the VAE of pictures and a CLIP text encoder.

    Args:
        pipe: the pipeline, with its UNet in float32.
        device: the device that everything is computed on.
        dtype: the dtype in which the encoders compute and the cache stores their outputs.
    """

    recomputed = _RESIDUAL
    # In SD-1.5 each of these has at most 49 M weights. Embeddings and outer layers, 3 M, stay in the root module.
    sharded = (*_RESIDUAL, Downsample2D, Upsample2D)
    compiled = (BasicTransformerBlock,)
    has_comfyui_names = True
    memory_format = torch.channels_last  # makes convolutions faster, on a CPU too

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
        self.pipe = pipe
        self.model: UNet = pipe.unet
        self.model.to(memory_format=self.memory_format)
        self.vae = PictureVae(pipe.vae, device, dtype)
        self.text = ClipText(pipe.tokenizer, pipe.text_encoder, device, dtype)
        self.schedule = NoiseSchedule(self.scheduler_config)
        self.device = device
        self.dtype = dtype

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of the pipeline's scheduler: betas, prediction type, spacing, offset."""
        return dict(self.pipe.scheduler.config)

    def picture_shape(self, resolution: int) -> tuple[int, int, int]:
        """Returns (C, h, w), the shape of the latent of a square picture.

        Raises:
            ConfigError: VAE and UNet cannot halve the resolution as often as they have to.
        """
        config, downscale = self.model.config, self.vae.downscale
        step = downscale * 2 ** (len(config.block_out_channels) - 1)
        if resolution % step:
            raise ConfigError(f"data.resolution = {resolution} must be a multiple of {step} for this model")
        return config.in_channels, resolution // downscale, resolution // downscale

    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        """Returns text embeddings `(1, L, D)` per prompt; see `Family.encode_prompts`."""
        return self.text.encode(prompts)

    def example_row(self) -> Conditioning:
        """Returns one row of embeddings, zeros `(1, L, D)`, without running the encoder."""
        return Conditioning({PROMPT_EMBEDS: torch.zeros(1, self.text.length, self.text.width)})

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """See `Family.too_long`."""
        return self.text.too_long(prompts)

    def coder(self) -> Coder:
        """See `Family.coder`."""
        return self.vae.coder()

    def park_encoders(self) -> None:
        """See `Family.park_encoders`."""
        self.vae.park()
        self.text.park()

    def fingerprint(self) -> dict[str, str]:
        """Returns digests of VAE, text encoder and tokenizer, and the dtype."""
        return self.vae.fingerprint() | self.text.fingerprint() | {"dtype": str(self.dtype)}

    def solver(self, config: SamplerConfig, latent_shape: Sequence[int]) -> DiffusionSolver:
        """See `Family.solver`."""
        return DiffusionSolver(self.scheduler_config, config)

    def reverse_steps(self, config: SamplerConfig, eta: float, window: tuple[int, int] | None) -> tuple[Step, ...]:
        """See `Family.reverse_steps`."""
        return reverse_steps(self.scheduler_config, config, eta, window)

    def identity(self) -> str:
        """Returns a digest of the UNet's weights and settings and of the schedule."""
        return digest_of_parts(self.model, self.model.config, self.scheduler_config)

    def empty(self) -> UNet:
        """See `Family.empty`."""
        with torch.device("meta"):
            empty = type(self.model).from_config(self.model.config)
        return empty.to(memory_format=self.memory_format)

    @classmethod
    def lora_targets(cls, model: nn.Module, where: LoraPlace) -> list[str]:
        """Returns the projections of the attention layers: all, those within a frame, or those in motion modules."""
        if where == "both":
            return _LORA_TARGETS
        ends = tuple(f".{target}" for target in _LORA_TARGETS)
        names = [name for name, _ in model.named_modules() if name.endswith(ends)]
        return [name for name in names if (_MOTION in name.split(".")) == (where == "motion")]

    @classmethod
    def recompute(cls, model: nn.Module) -> None:
        """Turns on gradient checkpointing: diffusers' own for pictures, that of `models.recompute` for clips."""
        if any(isinstance(module, AnimateDiffTransformer3D) for module in model.modules()):
            super().recompute(model)
        else:
            model.enable_gradient_checkpointing()  # type: ignore[operator]

    @classmethod
    def joint_parts(cls, model: nn.Module) -> JointParts:
        """Returns down, mid and up blocks; the layers on the time embedding are those with one row per sample."""
        assert isinstance(model, UNet)
        blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
        tail = [model.conv_norm_out, model.conv_act, model.conv_out]
        times = [part for part in model.modules() if isinstance(part, TimestepEmbedding)]
        resnets = [part for part in model.modules() if isinstance(part, ResnetBlock2D)]
        rows = [layer for part in times for layer in (part.linear_1, part.linear_2)]
        rows += [part.time_emb_proj for part in resnets]
        return JointParts(*([part for part in parts if part is not None] for parts in (blocks, tail, rows)))

    def set_attention(self, model: nn.Module, backend: Attention) -> None:
        """See `models.attention.set_attention`."""
        set_attention(model, backend)

    def choose_attention(self, wanted: AttentionChoice, model: nn.Module, **circumstances: Any) -> Attention:
        """See `models.attention.choose_attention`."""
        return choose_attention(wanted, model, **circumstances)

    def set_temporal_attention(self, model: nn.Module, backend: TemporalAttention) -> None:
        """See `models.temporal_attention`."""
        set_temporal_attention(model, backend)

    def save(self, folder: Path) -> None:
        """Writes the pipeline with the UNet's current weights to a folder that `from_pretrained` loads."""
        parts = {**self.pipe.components, "unet": _contiguous(self.model), "vae": _contiguous(self.pipe.vae)}
        self.assembled(parts).save_pretrained(folder, safe_serialization=True)
        self.text.save(folder / "text_encoder")

    def assembled(self, parts: dict[str, Any]) -> DiffusionPipeline:
        """Returns a pipeline assembled from these parts."""
        return type(self.pipe)(**parts)

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes a LoRA of the UNet to a folder that `pipe.load_lora_weights` loads."""
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights, safe_serialization=True)

    def load_lora(self, folder: Path) -> None:
        """See `Family.load_lora`."""
        self.pipe.load_lora_weights(folder, use_safetensors=True)

    def merge_lora(self) -> None:
        """See `Family.merge_lora`."""
        self.model.fuse_lora()
        self.model.unload_lora()

    def comfyui_lora(self, weights: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the LoRA and its alphas under the key names of kohya's scripts, which ComfyUI, A1111 and others read.

        The metadata are those that kohya's scripts write: rank, alpha and base model, by which other tools sort LoRAs.
        """
        second = self.model.config.cross_attention_dim == 1024  # OpenCLIP's width; SD-1.5's is 768
        velocity = self.scheduler_config["prediction_type"] == "v_prediction"
        base = ("sd_v2_v" if velocity else "sd_v2") if second else "sd_v1"
        architectures = {"sd_v1": "v1", "sd_v2": "v2-512", "sd_v2_v": "v2-768-v"}
        metadata = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(rank),
            "ss_base_model_version": base,
            "ss_v2": str(second),
            "modelspec.architecture": f"stable-diffusion-{architectures[base]}/lora",
            "modelspec.prediction_type": "v" if velocity else "epsilon",
        }
        return convert_state_dict_to_kohya({f"unet.{name}": tensor for name, tensor in weights.items()}), metadata


def _contiguous(module: UNet | AutoencoderKL) -> UNet | AutoencoderKL:
    """Returns a copy on the CPU with contiguous tensors: safetensors refuses others."""
    with torch.device("meta"):
        copy = type(module).from_config(module.config)
    copy.load_state_dict({name: t.cpu().contiguous() for name, t in module.state_dict().items()}, assign=True)
    return copy
