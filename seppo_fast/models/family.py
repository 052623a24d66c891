"""The interface of a model family. Code outside `models/` calls a model only through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config, SamplerConfig
from seppo_fast.config.vocabulary import Attention, AttentionChoice, LoraPlace, TemporalAttention
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.diffusion.sampler import Sampler, Solver, classifier_free
from seppo_fast.diffusion.schedule import Schedule
from seppo_fast.diffusion.steps import Step
from seppo_fast.models.fake import empty_copy
from seppo_fast.models.recompute import recompute_units
from seppo_fast.utils.errors import ConfigError

Inputs = Callable[[int], tuple[Tensor, Tensor, Conditioning]]
"""number of rows -> latents, times and conditioning with that many rows, on the CPU"""


class JointParts(NamedTuple):
    """The parts of a network that let policy and reference share one forward; see `methods.joint_forward`.

    Attributes:
        blocks: the blocks of the network, in the order in which they run, each on all rows. Every LoRA layer must be
            in one of them.
        tail: the modules that run after the blocks, in order.
        row_layers: the linear layers, anywhere in the network, whose input has exactly one row per sample.
    """

    blocks: Sequence[nn.Module]
    tail: Sequence[nn.Module]
    row_layers: Sequence[nn.Module]


class Coder(NamedTuple):
    """The network that converts between latents and pixels (a VAE), for estimates of its memory and compute.

    Attributes:
        network: the module that `Family.decode` and `Family.encode_images` run.
        there_and_back: decodes latents `(B, *latent)` and encodes the pixels again, with the network or a copy of it.
            It uses the batch sizes of `decode` and `encode_images`, but does not round pixels to 8 bits.
    """

    network: nn.Module
    there_and_back: Callable[[nn.Module, Tensor], Tensor]


class Family(ABC):
    """A loaded model with everything that training, sampling and export need from it.

    To add a model, write a subclass that sets `model`, `schedule`, `device` and `dtype` in its constructor and
    implements the abstract methods; the defaults of the other methods fit a plain network. Register it with
    `models.registry.register`.

    Methods with a `model` parameter are called with `Family.model` or with a copy of it: a reference, a sharded model,
    or a copy without data. They must use that argument, not `self.model`.

    Attributes:
        pipelines: the values of `_class_name` in `model_index.json` by which the registry finds the family.
        recomputed: the module classes that gradient checkpointing recomputes as a whole.
        sharded: the module classes whose weights are gathered as a whole when the model is sharded.
        compiled: the classes of the repeated blocks; torch.compile compiles each such block separately.
        memory_format: the memory format of the network's weights, unless sharding or 8-bit AdamW needs contiguous ones.
        makes_clips: whether samples are clips rather than pictures.
        has_comfyui_names: whether ComfyUI has key names for a LoRA on this network; see `comfyui_lora`.
        frames: the number of frames per clip; None if the model makes pictures.
        model: the network to train, with float32 weights, so that saving an untrained model writes the loaded values.
        schedule: the forward process (noising) and the regression target.
        device: the device that everything is computed on.
        dtype: the dtype in which the encoders compute and in which the cache stores their outputs.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    recomputed: ClassVar[tuple[type[nn.Module], ...]] = ()
    sharded: ClassVar[tuple[type[nn.Module], ...]] = ()
    compiled: ClassVar[tuple[type[nn.Module], ...]] = ()
    memory_format: ClassVar[torch.memory_format] = torch.contiguous_format
    makes_clips: ClassVar[bool] = False
    has_comfyui_names: ClassVar[bool] = False
    frames: int | None = None
    model: nn.Module
    schedule: Schedule
    device: torch.device
    dtype: torch.dtype
    _example: Conditioning | None = None

    @classmethod
    @abstractmethod
    def of_config(cls, config: Config, device: torch.device, dtype: torch.dtype) -> Family:
        """Loads the model that a configuration names. The network stays on the CPU until it is trained or called.

        Args:
            config: the run's configuration; `model.path` is a folder, a hub id or the name of an embedded model.
            device: the device on which everything will be computed.
            dtype: the dtype of the encoders' computation and of the cache.

        Raises:
            ConfigError: The model does not exist, is another kind of model, has no safetensors weights, or is damaged.
        """

    @classmethod
    def validate(cls, config: Config) -> None:
        """Checks before anything is loaded that this family supports the configuration's settings.

        Raises:
            ConfigError: A setting is not supported. The message names it and says what to do.
        """
        lacks = {
            "model.train = lora": config.model.train == "lora" and _is_default(cls, "lora_targets"),
            "reference.errors = together": config.reference.errors == "together" and _is_default(cls, "joint_parts"),
            "model.attention = xformers": config.model.attention == "xformers" and _is_default(cls, "set_attention"),
            "model.gradient_checkpointing = true": config.model.gradient_checkpointing
            and not cls.recomputed
            and _is_default(cls, "recompute"),
            "model.compile = true": config.model.compile and not cls.compiled,
        }
        for setting, is_lacking in lacks.items():
            if is_lacking:
                raise ConfigError(f"{setting}: {cls.__name__} does not support this; change the setting")
        if not cls.makes_clips:
            _refuse_settings_of_clips(config)

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Returns the shape of one latent, for a picture (or clip) of `resolution` x `resolution` pixels.

        Raises:
            ConfigError: The model does not support this resolution.
        """

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Encodes uint8 pictures `(B, H, W, 3)` or clips `(B, F, H, W, 3)` to scaled latents `(B, *latent)`."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        """Encodes prompts; the empty prompt is the unconditional one of guidance.

        Returns:
            One `Conditioning` with a single row per prompt, on the CPU. Rows may differ in length; see `collate`.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Decodes scaled latents `(B, *latent)` to uint8 pictures `(B, H, W, 3)` or clips `(B, F, H, W, 3)`."""

    @abstractmethod
    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Runs the network on latents `(B, *latent)` at times `(B,)`; returns its prediction `(B, *latent)`."""

    @abstractmethod
    def solver(self, config: SamplerConfig, latent_shape: Sequence[int]) -> Solver:
        """Returns a new solver for one batch of latents, each of shape `latent_shape`.

        Raises:
            ConfigError: This model's schedule does not support the sampler's settings.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Returns digests of everything that determines the encoders' outputs: weights, tokenizer, dtype.

        A cache of latents and embeddings is valid only for a model with the same fingerprint.
        """

    @abstractmethod
    def identity(self) -> str:
        """Returns a digest of everything that determines the network's predictions and how they are sampled."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the model's current weights to a folder that `of_config` and the model's own library can load."""

    def collate(self, rows: Sequence[Conditioning]) -> Conditioning:
        """Combines conditionings into one batch. Override it if rows can differ in length, and pad them.

        The padding may depend only on the rows' lengths. Rows of equal shapes may also be concatenated without a call
        to this method.
        """
        return Conditioning.cat(rows)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Combines both predictions into the guided one; by default with classifier-free guidance."""
        return classifier_free(conditional, unconditional, scale)

    def sampler(self, config: SamplerConfig, latent_shape: Sequence[int]) -> Sampler:
        """Returns the sampler that the settings describe.

        Raises:
            ConfigError: Latents of this shape cannot be sampled with these settings.
        """
        self.solver(config, latent_shape)
        return Sampler(config, partial(self.solver, config), self.guide)

    def reverse_steps(self, config: SamplerConfig, eta: float, window: tuple[int, int] | None) -> tuple[Step, ...]:
        """Returns the steps of the reverse process, for objectives that train on the random ones.

        Args:
            config: the sampler's settings.
            eta: the share of DDPM's noise.
            window: the first and the last random step; see `seppo_fast.diffusion.steps.reverse_steps`.

        Raises:
            ConfigError: This family has no such steps, or not with these settings.
        """
        raise ConfigError(f"{type(self).__name__} models have no random sampling steps here: use another objective")

    def remarks_on_end(self, config: SamplerConfig, steps: Sequence[Step]) -> list[str]:
        """Returns sentences on where the end of these steps differs from the pipeline's own sampling."""
        return []

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Returns the prompts that `encode_prompts` truncates."""
        return []

    def park_encoders(self) -> None:  # noqa: B027 - optional: a family may have no encoders
        """Moves the encoders to the CPU. Training does not need them: it reads their outputs from the cache."""

    def coder(self) -> Coder | None:
        """Returns the network that decodes and encodes; None if there is no such network or its cost is negligible."""
        return None

    def example_row(self) -> Conditioning:
        """Returns one row of conditioning, of which only the shapes and dtypes matter; encoded at the first call."""
        if self._example is None:
            self._example = self.encode_prompts([""])[0]
            self.park_encoders()
        return self._example

    def example_inputs(self, resolution: int) -> Inputs:
        """Returns a function that makes inputs of `denoise` for a given number of rows: zeros, on the CPU."""
        latent_shape, dtype = self.latent_shape(resolution), self.schedule.dtype
        row = self.example_row()

        def inputs(rows: int) -> tuple[Tensor, Tensor, Conditioning]:
            zeros = row.map(lambda t: torch.zeros(rows, *t.shape[1:], dtype=_computed(t.dtype)))
            return torch.zeros(rows, *latent_shape), torch.zeros(rows, dtype=dtype), zeros

        return inputs

    def empty(self) -> nn.Module:
        """Returns the network without data: on the `meta` device, in float32, as it is before `make_trainable`."""
        return empty_copy(self.model)

    @classmethod
    def lora_targets(cls, model: nn.Module, where: LoraPlace) -> list[str]:
        """Returns the names, or suffixes of names, of the layers that get a LoRA (peft's `target_modules`).

        Raises:
            ConfigError: The family does not support LoRA.
        """
        raise ConfigError(f"model.train = lora: {cls.__name__} has no layers for a LoRA; use full")

    @classmethod
    def recompute(cls, model: nn.Module) -> None:
        """Turns on gradient checkpointing in place."""
        recompute_units(model, cls.recomputed)

    @classmethod
    def joint_parts(cls, model: nn.Module) -> JointParts:
        """Returns the parts of the network that `reference.errors = together` runs.

        Raises:
            ConfigError: The family does not support it.
        """
        raise ConfigError(f"reference.errors = together is not supported by {cls.__name__}; use ahead")

    def set_attention(self, model: nn.Module, backend: Attention) -> None:
        """Sets the network's attention backend.

        Raises:
            ConfigError: The family does not support this backend.
        """
        if backend != "sdpa":
            raise ConfigError(f"model.attention = {backend} is not supported by {type(self).__name__}; use sdpa")

    def choose_attention(self, wanted: AttentionChoice, model: nn.Module, **circumstances: Any) -> Attention:
        """Returns the requested backend, or the faster one for `auto`; see `models.attention.choose_attention`."""
        return "xformers" if wanted == "xformers" else "sdpa"

    def set_temporal_attention(self, model: nn.Module, backend: TemporalAttention) -> None:  # noqa: B027
        """Sets the backend of the attention over a clip's frames; does nothing if the network has none."""

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes a LoRA's weights to a folder that the model's own library can load."""
        raise ConfigError(f"{type(self).__name__} has no format for a LoRA; use --format diffusers")

    def load_lora(self, folder: Path) -> None:
        """Adds a LoRA that `save_lora` wrote to the network."""
        raise ConfigError(f"{type(self).__name__} has no format for a LoRA")

    def merge_lora(self) -> None:
        """Merges the LoRA into the base weights and removes its layers."""
        raise ConfigError(f"{type(self).__name__} has no LoRA to merge")

    def comfyui_lora(self, weights: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns a LoRA's weights under ComfyUI's key names, and the metadata to write into the file.

        Raises:
            ConfigError: ComfyUI has no key names for this family.
        """
        raise ConfigError(f"ComfyUI has no key names for a LoRA of {type(self).__name__}; use --format lora")


def _is_default(family: type[Family], name: str) -> bool:
    own, default = getattr(family, name), getattr(Family, name)
    return getattr(own, "__func__", own) is getattr(default, "__func__", default)


def _refuse_settings_of_clips(config: Config) -> None:
    for section, names in {"model": ("lora_on", "temporal_attention"), "data": ("frames", "flip")}.items():
        for name in names:
            settings = getattr(config, section)
            value = getattr(settings, name)
            if value != type(settings).model_fields[name].default:
                raise ConfigError(
                    f"{section}.{name} = {value!r} is for clips only: set model.motion_adapter, or remove this setting"
                )


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which conditioning enters the network: float32 for any float, since autocast casts it."""
    return torch.float32 if dtype.is_floating_point else dtype
