"""Stable Diffusion 1.5 and everything in its diffusers format: UNet, CLIP text encoder, AutoencoderKL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from seppo_fast.models.family import UNet
from seppo_fast.models.loading import check_pipeline, load_pipeline, rescheduled
from seppo_fast.utils.errors import ConfigError


class StableDiffusion:
    """A loaded pipeline, seen as the four things training needs: load, encode, denoise, decode.

    Attributes:
        frames: of a clip; None where the model makes pictures.

    Args:
        pipe: the pipeline; its safety checker is not loaded, training never shows a picture to one.
        device: where everything is computed.
        dtype: in which the encoders compute and the cache is kept; the weights are float32, so that what is saved
            is what was loaded.
    """

    frames: int | None = None

    def __init__(self, pipe: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
        self.pipe = pipe
        self.device = device
        self.dtype = dtype
        for part in (pipe.unet, pipe.vae):
            part.to(memory_format=torch.channels_last)  # convolutions are faster so, on a CPU too
        self.park_encoders()

    @classmethod
    def load(
        cls,
        path: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        beta_schedule: str | None = None,
    ) -> StableDiffusion:
        """Loads a diffusers folder, a hub id, or `shapes`, the pipeline that ships with the package.

        Args:
            path: where the pipeline is.
            device: where everything is to be computed; the parts move there when they are first used.
            dtype: in which the encoders compute, and of what they put in the cache.
            beta_schedule: in place of the one in the pipeline's scheduler config.

        Raises:
            ConfigError: nothing there, another kind of pipeline, weights that are not safetensors, damaged files.
        """
        pipe = load_pipeline(check_pipeline(path))
        if beta_schedule is not None:
            pipe.scheduler = rescheduled(pipe.scheduler, type(pipe.scheduler), beta_schedule=beta_schedule)
        return cls(pipe, device, dtype)

    @property
    def unet(self) -> UNet:
        """The module that is trained."""
        return self.pipe.unet

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The configuration of the pipeline's scheduler: betas, prediction type, spacing, offset."""
        return dict(self.pipe.scheduler.config)

    @property
    def downscale(self) -> int:
        """Pixels per latent element, along one side."""
        return self.pipe.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """(C, H, W) of the latent of a square picture of `resolution` pixels.

        Raises:
            ConfigError: the resolution does not divide through the VAE and the UNet.
        """
        step = self.downscale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution % step:
            raise ConfigError(f"data.resolution = {resolution} must be a multiple of {step} for this model")
        return (self.unet.config.in_channels, resolution // self.downscale, resolution // self.downscale)

    def denoise(self, unet: nn.Module, latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        """The UNet's prediction `(B, C, H, W)` for latents `(B, C, H, W)`, timesteps `(B,)`, embeds `(B, L, D)`."""
        return unet(latents, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents `(B, C, h, w)` of uint8 pictures `(B, H, W, 3)`: the mode of the VAE's posterior.

        The mode, not a sample: the cache holds one latent per picture, and the posterior's spread is tiny.
        """
        self._encoders_on(self.device)
        pixels = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with self._autocast():
            latents = self.pipe.vae.encode(pixels).latent_dist.mode() * self.pipe.vae.config.scaling_factor
        return latents.to(self.dtype).cpu()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Text embeddings `(B, L, D)`; prompts longer than the encoder takes are truncated, as the pipeline does."""
        self._encoders_on(self.device)
        tokens = self.pipe.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with self._autocast():
            embeds = self.pipe.text_encoder(tokens.input_ids.to(self.device))[0]
        return embeds.to(self.dtype).cpu()

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that `encode_prompts` truncates."""
        limit = self.pipe.tokenizer.model_max_length
        lengths = [len(ids) for ids in self.pipe.tokenizer(list(prompts), verbose=False).input_ids] if prompts else []
        return [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > limit]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures `(B, H, W, 3)` uint8 of scaled latents `(B, C, h, w)`, about a megapixel at a time."""
        self._encoders_on(self.device)
        scaled = (latents / self.pipe.vae.config.scaling_factor).to(self.device)
        rows = max(1, 2**20 // (self.downscale**2 * latents[0, 0].numel()))
        with self._autocast():
            pixels = torch.cat([self.pipe.vae.decode(chunk).sample.float().cpu() for chunk in scaled.split(rows)])
        return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    def park_encoders(self) -> None:
        """Moves VAE and text encoder off the device; training reads their work from the cache."""
        self._encoders_on(torch.device("cpu"))

    def fingerprint(self) -> dict[str, str]:
        """Digests of all that decides what the encoders write: VAE, text encoder, tokenizer, dtype."""
        tokenizer = json.loads(self.pipe.tokenizer.backend_tokenizer.to_str())
        # How the last call padded and truncated is kept there too, and is not part of what the tokenizer is.
        tokenizer |= {"padding": None, "truncation": None, "max_length": self.pipe.tokenizer.model_max_length}
        return {
            "vae": digest(self.pipe.vae),
            "scaling_factor": str(self.pipe.vae.config.scaling_factor),
            "text_encoder": digest(self.pipe.text_encoder),
            "tokenizer": hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest(),
            "dtype": str(self.dtype),
        }

    def identity(self) -> str:
        """A digest of all that decides what the UNet predicts and how it is sampled: weights, settings, schedule."""
        settings = [dict(self.unet.config), self.scheduler_config]
        # What begins with an underscore says where it was loaded from, and by which version.
        plain = [{key: value for key, value in one.items() if not key.startswith("_")} for one in settings]
        parts = [digest(self.unet), *(json.dumps(one, sort_keys=True, default=str) for one in plain)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the pipeline with its UNet as it is now, as a folder that `from_pretrained` loads.

        The text encoder's weights get the names that every version of transformers reads: up to 5.5 it fills those
        that a CLIPTextModel has since 5.6 with random numbers.
        """
        parts = {**self.pipe.components, "unet": _contiguous(self.pipe.unet), "vae": _contiguous(self.pipe.vae)}
        self._pipeline_of(parts).save_pretrained(folder, safe_serialization=True)
        encoder = self.pipe.text_encoder
        weights = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
        encoder.save_pretrained(folder / "text_encoder", state_dict=weights, save_original_format=False)

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes a LoRA of the UNet, as a folder that `pipe.load_lora_weights` loads."""
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights, safe_serialization=True)

    def _pipeline_of(self, parts: dict[str, Any]) -> DiffusionPipeline:
        return type(self.pipe)(**parts, requires_safety_checker=False)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _encoders_on(self, device: torch.device) -> None:
        self.pipe.vae.to(device)
        self.pipe.text_encoder.to(device)


def _contiguous(module: UNet | AutoencoderKL) -> UNet | AutoencoderKL:
    """A copy on the CPU whose tensors safetensors takes: it refuses those that are not contiguous."""
    with torch.device("meta"):
        copy = type(module).from_config(module.config)
    copy.load_state_dict({name: t.cpu().contiguous() for name, t in module.state_dict().items()}, assign=True)
    return copy


def digest(module: nn.Module) -> str:
    """sha256 of all names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.flatten().view(torch.uint8).numpy() if data.numel() else b"")
    return digest.hexdigest()
