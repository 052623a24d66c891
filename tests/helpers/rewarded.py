"""Small runs of methods that learn from rewards, and rewards: functions selected as `tests.helpers.rewarded:NAME`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.config.schema import Config
from seppo_fast.scorers.functions import brightness
from seppo_fast.train.trainer import Trainer
from tests.helpers.runs import collected, tiny_config

_RL = {
    "ddpo": {},
    "grpo": {"samples_per_prompt": 3},
    "nft": {"samples_per_prompt": 3},
    "d3po": {},
    "spo": {"candidates": 3, "plain_steps": 1, "gap": 0.0},
}
REWARDED = tuple(_RL)


def constant(prompts, pictures):
    """Returns the same for all; 0.1, of which a mean is rounded."""
    return np.full(len(prompts), 0.1)


def missing(prompts, pictures):
    """Returns no score at all."""
    return np.full(len(prompts), np.nan)


def small_only(prompts, pictures):
    """Returns the brightness if the prompt says "small"; all other prompts get the same."""
    return np.where(["small" in prompt for prompt in prompts], brightness(prompts, pictures), 0.5)


def known_small_only(prompts, pictures):
    """Returns the brightness if the prompt says "small", else none."""
    return np.where(["small" in prompt for prompt in prompts], brightness(prompts, pictures), np.nan)


def levels(prompts, pictures):
    """Returns the brightness as a whole number."""
    return np.floor(brightness(prompts, pictures) * 4000)


def rewarded_config(pipeline: Path, folder: Path, objective: str, **sections: Any) -> Config:
    """Returns a run of 4 updates in two iterations on `tiny_pipeline`, 6 samples an update and 3 steps a sample."""
    beta = {"d3po": 0.1, "spo": 10.0}.get(objective, 2000.0)
    defaults: dict[str, dict[str, Any]] = {
        "data": {"prompt_dropout": 0.0},
        "rl": {"reward": "brightness"} | _RL[objective],
        "train": {"updates": 4, "beta": beta},
        "sampler": {"steps": 3},
    }
    for name, section in defaults.items():
        sections[name] = section | sections.get(name, {})
    return tiny_config(pipeline, folder, objective=objective, **sections)


def nudge(model: nn.Module, seed: int, size: float = 0.004) -> None:
    """Changes each weight a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * weight.abs().mean() * torch.randn(weight.shape, generator=generator))


class Stages(NamedTuple):
    """Three different policies, as float64 networks, and what the run's second iteration collected for its last update.

    Attributes:
        trainer: the run; its policy is `policy`.
        batch: the batch of update 3, counted from 0.
        initial: checkpoint 0.
        newest: checkpoint 1, which sampled.
        policy: the policy that is now being trained.
    """

    trainer: Trainer
    batch: Any
    initial: nn.Module
    newest: nn.Module
    policy: nn.Module


def staged(config: Config) -> Stages:
    """Collects the last update of a `rewarded_config`, with another policy in each role."""
    trainer = Trainer(config)
    made = []
    for seed in (0, 1):
        trainer.add_checkpoint()
        made.append(copy.deepcopy(trainer.policy).double())
        trainer.finished = 2
        if not seed:
            nudge(trainer.policy, seed)
    batch = collected(trainer, 3)
    nudge(trainer.policy, 1)
    return Stages(trainer, batch, *made, copy.deepcopy(trainer.policy).double())


def predicted(
    stages: Stages, model: nn.Module, latents: Tensor, times: Tensor, examples: list[int], *, detach: bool = False
) -> Tensor:
    """Returns a float64 network's guided prediction; with `detach` its unconditional part gets no gradient."""
    family, scale = stages.trainer.family, stages.trainer.config.sampler.guidance
    rows = stages.trainer.cache.conditioning([None, *examples]).map(torch.Tensor.double)
    conditional = family.denoise(model, latents.double(), times, rows.take(slice(1, None)))
    if scale == 1:
        return conditional
    empty = family.denoise(model, latents.double(), times, rows.take(slice(0, 1)).expand(len(times)))
    empty = empty.detach() if detach else empty
    return empty + scale * (conditional - empty)


def gradients(model: nn.Module) -> Tensor:
    """Returns the gradients of all weights in one float64 tensor; zeros for weights without one."""
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
    return torch.cat([gradient.flatten().double() for gradient in found])


def rewards_of(trainer: Trainer, latents: Tensor) -> np.ndarray:
    """Returns the brightness of decoded latents, in the batches in which a run decodes."""
    pictures = np.concatenate([trainer.family.decode(part) for part in latents.split(8)])
    return pictures.reshape(len(latents), -1).astype(np.float64).mean(1) / 255
