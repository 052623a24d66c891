"""The dial: `memory = low | balanced | fast` fills in what a configuration leaves null.

Nothing here changes what is computed, but for rounding: batches, recomputation, compilation, attention kernels. What
was chosen stands in the run's `config.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel

from seppo_fast.attention import choose_attention, set_attention
from seppo_fast.config import Config
from seppo_fast.data.cache import LatentCache
from seppo_fast.memory import Footprint, free_bytes, sampling_footprint, training_footprint
from seppo_fast.policy import DTYPES, trainable


@dataclass(frozen=True)
class Setting:
    """What one position of the dial stands for.

    Attributes:
        share: of the free memory that a batch may fill.
        micro_batch: pairs, at most.
        batch: samples, at most.
        checkpointing: recompute activations.
        compile: the repeated blocks, on a GPU.
    """

    share: float
    micro_batch: int
    batch: int
    checkpointing: bool
    compile: bool


# `low` also parks the optimizer's state and the policy's weights in host memory while a reference is resident.
DIAL = {
    "low": Setting(share=0.5, micro_batch=1, batch=8, checkpointing=True, compile=False),
    "balanced": Setting(share=0.7, micro_batch=16, batch=64, checkpointing=False, compile=False),
    "fast": Setting(share=0.9, micro_batch=32, batch=128, checkpointing=False, compile=True),
}
# A CPU is busy with a few rows; more only leave its caches.
_CPU_ROWS = 32


def turn_dial(config: Config, device: torch.device) -> Config:
    """Fills in what must be known before the model is made: checkpointing and compilation."""
    setting = DIAL[config.memory]
    model: dict[str, Any] = {}
    if config.model.gradient_checkpointing is None:
        model["gradient_checkpointing"] = setting.checkpointing
    if config.model.compile is None:
        ahead = config.reference.errors == "ahead"
        model["compile"] = setting.compile and device.type == "cuda" and ahead
    return _filled(config, model=model)


def choose_batches(config: Config, unet: UNet2DConditionModel, cache: LatentCache, accelerator: Accelerator) -> Config:
    """Fills in attention, micro-batch and sampling batch, and sets the attention of `unet`.

    Args:
        config: of the run, through `turn_dial`.
        unet: on its device, its trained weights marked.
        cache: the data; the shapes of its latents and embeddings count.
        accelerator: all processes take the smallest choice of any.

    Raises:
        ConfigError: attention that is asked for and does not work.
    """
    device, dtype = accelerator.device, DTYPES[config.model.precision]
    setting = DIAL[config.memory]
    latent_shape = tuple(cache.latent_shape)
    prompt_shape = (cache.uncond_embeds.shape[1], cache.uncond_embeds.shape[2])
    most = _CPU_ROWS if device.type == "cpu" else max(setting.micro_batch, setting.batch)
    learner = _learner_bytes(config, unet)

    def fitting(footprint: Footprint, taken: int, cap: int) -> int:
        # At least 1: whether one row fits is better found out by trying than refused on an estimate.
        rows = max(1, footprint.largest(int(setting.share * free_bytes(device)) - taken, min(cap, most)))
        return int(accelerator.gather(torch.tensor([rows], device=device)).min())

    train, sampler = {}, {}
    if config.train.micro_batch is None:
        footprint = training_footprint(unet, latent_shape, prompt_shape, dtype, device)
        share = -(-config.train.pairs_per_update // accelerator.num_processes)
        train["micro_batch"] = fitting(footprint, learner, min(setting.micro_batch, share))
    if config.sampler.batch is None:
        guided = config.sampler.guidance > 1
        footprint = sampling_footprint(unet, latent_shape, prompt_shape, dtype, device, guided)
        aside = 0 if config.memory == "low" else learner + _trained_bytes(unet)
        sampler["batch"] = fitting(footprint, aside, setting.batch)
    config = _filled(config, train=train, sampler=sampler)
    assert config.train.micro_batch is not None
    attention = choose_attention(
        config.model.attention,
        unet,
        latent_shape=latent_shape,
        prompt_shape=prompt_shape,
        rows=2 * config.train.micro_batch,
        device=device,
        dtype=dtype,
    )
    (attention,) = broadcast_object_list([attention])  # as the first process measured: one choice for all
    set_attention(unet, attention)
    return _filled(config, model={"attention": attention})


def _trained_bytes(unet: UNet2DConditionModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in trainable(unet).values())


def _learner_bytes(config: Config, unet: UNet2DConditionModel) -> int:
    """Of what the learner adds to the weights and their gradients: Adam's two moments, the moving average."""
    moments = 0.5 if config.train.optimizer == "adamw8bit" else 2
    return int(_trained_bytes(unet) * (moments + (1 if config.train.ema_decay else 0)))


def _filled(config: Config, **sections: dict[str, Any]) -> Config:
    """`config` with keys of its sections set."""
    changed = {name: getattr(config, name).model_copy(update=keys) for name, keys in sections.items() if keys}
    return config.model_copy(update=changed)
