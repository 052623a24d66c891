"""Stable Diffusion 1.5 and other models in its diffusers format: UNet, CLIP text encoder, AutoencoderKL."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.models.encoders import PROMPT_EMBEDS
from seppo_fast.models.pipelines.loading import SD15_PIPELINES, check_pipeline, load_pipeline, rescheduled
from seppo_fast.models.unet import UNetFamily


class StableDiffusion(UNetFamily):
    """The family of Stable Diffusion models, which make pictures. The safety checker is never used or loaded."""

    pipelines = SD15_PIPELINES

    @classmethod
    def of_config(cls, config: Config, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
        """See `Family.of_config`."""
        return cls.load(config.model.path, device, dtype, beta_schedule=config.model.beta_schedule)

    @classmethod
    def load(
        cls,
        path: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        beta_schedule: str | None = None,
    ) -> StableDiffusion:
        """Loads a pipeline.

        Args:
            path: a diffusers folder, a hub id, or `shapes`, the pipeline that ships with the package.
            device: the device to compute on; each part moves there when it is first used.
            dtype: the dtype in which the encoders compute and the cache stores their outputs.
            beta_schedule: a noise schedule that overrides the one in the pipeline's scheduler configuration.

        Raises:
            ConfigError: The pipeline does not exist, is another kind of pipeline, has no safetensors weights, or is
                damaged.
        """
        pipe = load_pipeline(check_pipeline(path))
        if beta_schedule is not None:
            pipe.scheduler = rescheduled(pipe.scheduler, type(pipe.scheduler), beta_schedule=beta_schedule)
        return cls(pipe, device, dtype)

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Returns (C, h, w); see `UNetFamily.picture_shape`."""
        return self.picture_shape(resolution)

    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the UNet's prediction `(B, C, h, w)` for latents of that shape at timesteps `(B,)`."""
        return model(latents, times, encoder_hidden_states=conditioning[PROMPT_EMBEDS], return_dict=False)[0]

    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes uint8 pictures `(B, H, W, 3)` to scaled latents `(B, C, h, w)`."""
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Decodes scaled latents `(B, C, h, w)` to uint8 pictures `(B, H, W, 3)`."""
        return self.vae.decode(latents)

    def assembled(self, parts: dict[str, Any]) -> DiffusionPipeline:
        """Returns a pipeline assembled from these parts, without a safety checker."""
        return type(self.pipe)(**parts, requires_safety_checker=False)
