"""What a model family is to the rest: one small class a family, and nothing outside `models/` knows its parts."""

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
from seppo_fast.models.fake import empty_copy
from seppo_fast.models.recompute import recompute_units
from seppo_fast.utils.errors import ConfigError

Inputs = Callable[[int], tuple[Tensor, Tensor, Conditioning]]
"""rows -> latents, times and conditioning of so many rows, on the CPU"""


class JointParts(NamedTuple):
    """The parts of a network by which policy and reference can share a forward; see `methods.joint_forward`.

    Attributes:
        blocks: run in turn, each on all rows; a LoRA may lie in these.
        tail: run one after the other at the end.
        row_layers: linear layers, anywhere, whose input has one row a sample and no more.
    """

    blocks: Sequence[nn.Module]
    tail: Sequence[nn.Module]
    row_layers: Sequence[nn.Module]


class Coder(NamedTuple):
    """The network between latents and pixels, for counting what it takes.

    Attributes:
        network: what `Family.decode` and `Family.encode_images` run.
        there_and_back: decodes latents `(B, *latent)` and encodes the pixels, by the network or a copy of it, in the
            batches of those two and without their rounding to 8 bits.
    """

    network: nn.Module
    there_and_back: Callable[[nn.Module, Tensor], Tensor]


class Family(ABC):
    """A loaded model, seen as what training, sampling and export ask of it.

    A family sets `model`, `schedule`, `device` and `dtype`, and defines what is abstract here; the rest has defaults
    that fit a plain network. What takes a `model` is asked of `Family.model` or of a copy of it: a reference, shards,
    a copy without data.

    Attributes:
        pipelines: class names in `model_index.json`, by which the registry finds the family.
        recomputed: classes of modules that gradient checkpointing recomputes as a whole.
        sharded: classes of modules whose weights are gathered as a whole when the model is in shards.
        compiled: classes of the modules that repeat, which torch.compile takes one by one.
        memory_format: of the network, where all of its weights may lie as they like.
        makes_clips: whether its samples are clips.
        has_comfyui_names: whether ComfyUI can name the layers of its LoRA.
        frames: of a clip; None where the model makes pictures.
        model: the network that is trained.
        schedule: what it regresses on.
        device: where everything is computed.
        dtype: in which the encoders compute and the cache is kept; the network's weights are float32, so that what is
            saved is what was loaded.
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
        """Loads the model of a configuration; its network stays on the CPU until it is trained or called.

        Args:
            config: the configuration; `model.path` is a folder, a hub id or an embedded model.
            device: where everything is to be computed.
            dtype: of the encoders and the cache.

        Raises:
            ConfigError: nothing there, another kind of model, weights that are not safetensors, damaged files.
        """

    @classmethod
    def validate(cls, config: Config) -> None:
        """Refuses settings that do not go with this family, before anything is loaded.

        Raises:
            ConfigError: what does not fit, and what to do.
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
                raise ConfigError(f"{setting}: {cls.__name__} has no parts for that; leave it out")
        if not cls.makes_clips:
            _refuse_settings_of_clips(config)

    @abstractmethod
    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Returns the shape of the latent of a picture (or clip) of `resolution` x `resolution` pixels.

        Raises:
            ConfigError: a resolution that the model does not take.
        """

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Returns scaled latents `(B, *latent)` of uint8 pictures `(B, H, W, 3)` or clips `(B, F, H, W, 3)`."""

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> list[Conditioning]:
        """Returns one row for each prompt, on the CPU, as long as the prompt needs; the empty one is unconditional."""

    @abstractmethod
    def decode(self, latents: Tensor) -> np.ndarray:
        """Returns pictures `(B, H, W, 3)` or clips `(B, F, H, W, 3)`, uint8, of scaled latents `(B, *latent)`."""

    @abstractmethod
    def denoise(self, model: nn.Module, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the network's prediction `(B, *latent)` of latents `(B, *latent)` at times `(B,)`."""

    @abstractmethod
    def solver(self, config: SamplerConfig, latent_shape: Sequence[int]) -> Solver:
        """Returns a new solver for latents of a shape.

        Raises:
            ConfigError: settings that this model's schedule does not take.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Returns digests of all that decides what the encoders write: weights, tokenizer, dtype."""

    @abstractmethod
    def identity(self) -> str:
        """Returns a digest of all that decides what the network predicts and how it is sampled."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the model as it is now, as a folder that `of_config` and the library it comes from can read."""

    def collate(self, rows: Sequence[Conditioning]) -> Conditioning:
        """Returns single rows as one batch; a family whose rows differ in length pads them, by their lengths alone.

        Rows of equal shapes may be put together without it.
        """
        return Conditioning.cat(rows)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Returns the guided prediction; classifier-free guidance."""
        return classifier_free(conditional, unconditional, scale)

    def sampler(self, config: SamplerConfig, latent_shape: Sequence[int]) -> Sampler:
        """Returns how samples are made; raises ConfigError where latents of this shape cannot be sampled so."""
        self.solver(config, latent_shape)
        return Sampler(config, partial(self.solver, config), self.guide)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Returns those of the prompts of which `encode_prompts` sees only the beginning."""
        return []

    def park_encoders(self) -> None:  # noqa: B027 - most families have some, none must
        """Moves the encoders off the device; training reads their work from the cache."""

    def coder(self) -> Coder | None:
        """Returns what decodes and encodes; None where it is no network, or too small to be counted."""
        return None

    def example_row(self) -> Conditioning:
        """Returns one row of conditioning, whose shapes are all that counts; encoded once."""
        if self._example is None:
            self._example = self.encode_prompts([""])[0]
            self.park_encoders()
        return self._example

    def example_inputs(self, resolution: int) -> Inputs:
        """Returns what makes the inputs of `denoise` for any number of rows: zeros of the right shapes, on the CPU."""
        latent_shape, dtype = self.latent_shape(resolution), self.schedule.dtype
        row = self.example_row()

        def inputs(rows: int) -> tuple[Tensor, Tensor, Conditioning]:
            zeros = row.map(lambda t: torch.zeros(rows, *t.shape[1:], dtype=_computed(t.dtype)))
            return torch.zeros(rows, *latent_shape), torch.zeros(rows, dtype=dtype), zeros

        return inputs

    def empty(self) -> nn.Module:
        """Returns a network of the same structure on `meta`, in float32 and with nothing trained."""
        return empty_copy(self.model)

    @classmethod
    def lora_targets(cls, model: nn.Module, where: LoraPlace) -> list[str]:
        """Returns names, or their ends, of the layers that get a LoRA.

        Raises:
            ConfigError: the family has none.
        """
        raise ConfigError(f"model.train = lora: {cls.__name__} has no layers for a LoRA; use full")

    @classmethod
    def recompute(cls, model: nn.Module) -> None:
        """Turns gradient checkpointing on, in place."""
        recompute_units(model, cls.recomputed)

    @classmethod
    def joint_parts(cls, model: nn.Module) -> JointParts:
        """Returns what `reference.errors = together` runs.

        Raises:
            ConfigError: the family has no such parts.
        """
        raise ConfigError(f"reference.errors = together is not possible with {cls.__name__}; use ahead")

    def set_attention(self, model: nn.Module, backend: Attention) -> None:
        """Sets the attention of the network.

        Raises:
            ConfigError: a backend that the family does not have.
        """
        if backend != "sdpa":
            raise ConfigError(f"model.attention = {backend}: {type(self).__name__} has its own; use sdpa")

    def choose_attention(self, wanted: AttentionChoice, model: nn.Module, **circumstances: Any) -> Attention:
        """Returns the backend that is wanted, or for `auto` the faster one; see `models.attention`."""
        return "xformers" if wanted == "xformers" else "sdpa"

    def set_temporal_attention(self, model: nn.Module, backend: TemporalAttention) -> None:  # noqa: B027
        """Sets the attention over the frames of a clip, where there is one."""

    def save_lora(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Writes a LoRA, as a folder that the model's library reads."""
        raise ConfigError(f"{type(self).__name__} has no format for a LoRA; use --format diffusers")

    def load_lora(self, folder: Path) -> None:
        """Puts a LoRA that `save_lora` wrote onto the network."""
        raise ConfigError(f"{type(self).__name__} has no format for a LoRA")

    def merge_lora(self) -> None:
        """Adds the LoRA to the weights that it lies on, and removes it."""
        raise ConfigError(f"{type(self).__name__} has no LoRA to merge")

    def comfyui_lora(self, weights: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns a LoRA under the names that ComfyUI reads, and the metadata of its file."""
        raise ConfigError(f"ComfyUI has no key names of its own for {type(self).__name__}; use --format lora")


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
                    f"{section}.{name} = {value!r} is for clips: give model.motion_adapter, or leave it out"
                )


def _computed(dtype: torch.dtype) -> torch.dtype:
    """Of a floating-point condition float32, whatever it is stored in: autocast casts it where it is used."""
    return torch.float32 if dtype.is_floating_point else dtype
