"""Scores of the embedded world's judge for a model, on prompts and seeds of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import nn

from seppo_fast.config import Config
from seppo_fast.data.sources import Source
from seppo_fast.diffusion import NoiseSchedule, Sampler
from seppo_fast.evaluate.pictures import generate
from seppo_fast.families.sd import StableDiffusion
from seppo_fast.forward import Forward
from seppo_fast.shapes.judge import score_all
from seppo_fast.shapes.world import SIZE, caption, scene

# Streams of the shapes world, and seeds of the noise that pictures start from. Settings are chosen on the first.
DEVELOPMENT, REPORT = 1001, 2002
DEVELOPMENT_PROMPTS, REPORT_PROMPTS = 400, 1200


def held_out_prompts(stream: int, count: int, excluded: Collection[str]) -> list[str]:
    """The first `count` different captions of a stream of the shapes world that are not excluded.

    Raises:
        ValueError: there are not so many: 48 captions have one shape, 7,680 have two.
    """
    captions = dict.fromkeys(caption(scene(stream, index)) for index in range(20 * count))
    chosen = [text for text in captions if text not in excluded][:count]
    if len(chosen) < count:
        raise ValueError(f"count: {count} prompts are asked for, {len(chosen)} are left")
    return chosen


def prompt_sets(trained_on: Source) -> tuple[list[str], list[str]]:
    """Prompts to choose settings on, and prompts to report on: no caption is in both, or among the winners'."""
    winners = {example.prompt for example in trained_on}
    development = held_out_prompts(DEVELOPMENT, DEVELOPMENT_PROMPTS, winners)
    return development, held_out_prompts(REPORT, REPORT_PROMPTS, winners | set(development))


def judged_pictures(
    family: StableDiffusion, forward: Forward, model: nn.Module, sampler: Sampler, prompts: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and their scores.

    Args:
        family: the pipeline.
        forward: how the model is called.
        model: the UNet.
        sampler: how pictures are made.
        prompts: captions of the shapes world.
        seed: of the starting noise; picture i starts from noise (seed, i), whatever the model.

    Returns:
        Pictures `(N, 32, 32, 3)` uint8 and scores `(N,)`: the share of asked-for attributes that the judge finds.
    """
    pictures = generate(family, forward, model, sampler, prompts, resolution=SIZE, seed=seed)
    return pictures, np.asarray(score_all(list(prompts), pictures))


def judged_pipeline(path: str, config: Config, prompts: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `judged_pictures`, of a pipeline folder, with the sampler of a configuration."""
    family = StableDiffusion.load(path, torch.device("cpu"))
    forward = Forward(family, NoiseSchedule(family.scheduler_config), torch.float32)
    sampler = Sampler(family.scheduler_config, config.sampler)
    return judged_pictures(family, forward, family.unet, sampler, prompts, seed)
