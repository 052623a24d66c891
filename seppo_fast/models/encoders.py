"""The encoders of a pipeline: a CLIP text encoder, and the VAE of pictures.

A family holds the ones it needs. Each stays on the CPU until it is called.

Shape legend: B pictures or prompts, H x W pixels, C x h x w a latent, L tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.models.family import Coder

PROMPT_EMBEDS = "prompt_embeds"
"""The name of the text embeddings `(B, L, D)` in a `Conditioning`; diffusers' pipelines use the same name."""


class ClipText:
    """A CLIP tokenizer and text encoder.

    Args:
        tokenizer: the tokenizer; its `model_max_length` is the number of tokens of every prompt's embedding.
        encoder: the text encoder, in float32.
        device: the device that the encoder computes on.
        dtype: the dtype of the computation and of the embeddings.
    """

    def __init__(
        self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder
        self._device, self._dtype = device, dtype

    @property
    def length(self) -> int:
        """The number of tokens of every prompt's embedding."""
        return self._tokenizer.model_max_length

    @property
    def width(self) -> int:
        """The width of an embedding."""
        return self._encoder.config.hidden_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """Returns one row per prompt, on the CPU. Longer prompts are truncated, as in diffusers' pipelines."""
        self._encoder.to(self._device)
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        with _autocast(self._device, self._dtype):
            embeds = self._encoder(tokens.input_ids.to(self._device))[0]
        return [Conditioning({PROMPT_EMBEDS: row}) for row in embeds.to(self._dtype).cpu().split(1)]

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Returns the prompts that `encode` truncates."""
        lengths = [len(ids) for ids in self._tokenizer(list(prompts), verbose=False).input_ids] if prompts else []
        return [prompt for prompt, length in zip(prompts, lengths, strict=True) if length > self.length]

    def park(self) -> None:
        """Moves the encoder to the CPU."""
        self._encoder.to("cpu")

    def fingerprint(self) -> dict[str, str]:
        """Returns digests of encoder and tokenizer."""
        tokenizer = json.loads(self._tokenizer.backend_tokenizer.to_str())
        # The JSON also records how the last call padded and truncated, which is not a property of the tokenizer.
        tokenizer |= {"padding": None, "truncation": None, "max_length": self.length}
        return {
            "text_encoder": digest(self._encoder),
            "tokenizer": hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest(),
        }

    def save(self, folder: Path) -> None:
        """Writes the encoder's weights under the names that every version of transformers reads.

        transformers up to 5.5 does not know the names that 5.6 gives a CLIPTextModel, and would fill these weights with
        random numbers.
        """
        state = self._encoder.state_dict()
        weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
        self._encoder.save_pretrained(folder, state_dict=weights, save_original_format=False)


class PictureVae:
    """An AutoencoderKL for pictures. Clips are encoded and decoded frame by frame.

    Args:
        vae: the VAE, in float32.
        device: the device that the VAE computes on.
        dtype: the dtype of the computation and of the latents.
    """

    def __init__(self, vae: AutoencoderKL, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = vae
        self._device, self._dtype = device, dtype
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.to(memory_format=torch.channels_last)  # makes convolutions faster, on a CPU too

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes uint8 pictures `(B, H, W, 3)` to scaled latents `(B, C, h, w)`: the mode of the VAE's posterior.

        The mode, not a sample: the cache holds one latent per picture, and the posterior's spread is tiny.
        """
        self._vae.to(self._device)
        pixels = images.to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with _autocast(self._device, self._dtype):
            latents = self._vae.encode(pixels).latent_dist.mode() * self._vae.config.scaling_factor
        return latents.to(self._dtype).cpu()

    @torch.no_grad()
    def encode_clips(self, clips: Tensor) -> Tensor:
        """Encodes uint8 clips `(B, F, H, W, 3)` to scaled latents `(B, C, F, h, w)`, about a megapixel at a time."""
        frames = clips.flatten(0, 1)
        latents = torch.cat([self.encode(chunk) for chunk in frames.split(_megapixel(*frames.shape[1:3]))])
        return latents.unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decodes scaled latents `(B, C, h, w)` to uint8 pictures `(B, H, W, 3)`, about a megapixel at a time."""
        self._vae.to(self._device)
        scaled = (latents / self._vae.config.scaling_factor).to(self._device)
        with _autocast(self._device, self._dtype):
            pixels = self._decoded(self._vae, scaled)
        return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    def decode_clips(self, latents: Tensor) -> np.ndarray:
        """Decodes scaled latents `(B, C, F, h, w)` to uint8 clips `(B, F, H, W, 3)`, about a megapixel at a time."""
        pixels = self.decode(latents.transpose(1, 2).flatten(0, 1))
        return pixels.reshape(len(latents), latents.shape[2], *pixels.shape[1:])

    def coder(self) -> Coder:
        """See `Family.coder`."""
        return Coder(self._vae, self._there_and_back)

    def _there_and_back(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Implements `Coder.there_and_back`; for clips, it returns the latents of their frames."""
        clips = latents.dim() == 5
        pixels = self._decoded(vae, latents.transpose(1, 2).flatten(0, 1) if clips else latents)
        rows = _megapixel(*pixels.shape[2:]) if clips else len(pixels)
        return torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pixels.split(rows)])

    def _decoded(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Returns pixels `(B, 3, H, W)` float32 in -1..1 on the CPU, decoded about a megapixel at a time."""
        rows = _megapixel(*(self.downscale * side for side in latents.shape[2:]))
        return torch.cat([vae.decode(chunk).sample.float().cpu() for chunk in latents.split(rows)])

    def park(self) -> None:
        """Moves the VAE to the CPU."""
        self._vae.to("cpu")

    def fingerprint(self) -> dict[str, str]:
        """Returns a digest of the weights, and the scaling factor of the latents."""
        return {"vae": digest(self._vae), "scaling_factor": str(self._vae.config.scaling_factor)}


def _megapixel(height: int, width: int) -> int:
    """Returns how many pictures of this size have about a megapixel together; at least one."""
    return max(1, 2**20 // (height * width))


def _autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def digest(module: nn.Module) -> str:
    """Returns the SHA-256 of the names, shapes, dtypes and values in a module's state dict."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        sha.update(f"{name} {tuple(data.shape)} {data.dtype}".encode())
        sha.update(data.flatten().view(torch.uint8).numpy() if data.numel() else b"")
    return sha.hexdigest()


def digest_of_parts(*parts: Any) -> str:
    """Returns the SHA-256 of several parts: of modules by their weights, of mappings of settings by their values.

    Settings whose name begins with an underscore are ignored: they record where and with which version of a library the
    part was made.
    """
    lines = []
    for part in parts:
        if isinstance(part, nn.Module):
            lines.append(digest(part))
        else:
            plain = {key: value for key, value in dict(part).items() if not key.startswith("_")}
            lines.append(json.dumps(plain, sort_keys=True, default=str))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
