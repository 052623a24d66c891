"""Scores of the embedded world's judge for a model, on prompts and seeds of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from seppo_fast.config.schema import Config
from seppo_fast.data.sources import Source
from seppo_fast.diffusion.sampler import Sampler
from seppo_fast.evaluation.generate import generate
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.pipelines.folders import load_as
from seppo_fast.models.registry import load_family
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.shapes import motion
from seppo_fast.shapes.world import SIZE, caption, scene

# Streams of the shapes world, and seeds of the noise that pictures start from. Settings are chosen on the first.
DEVELOPMENT, REPORT = 1001, 2002
DEVELOPMENT_PROMPTS, REPORT_PROMPTS = 400, 1200
CLIPS_PER_PROMPT = 4


def held_out_prompts(stream: int, count: int, excluded: Collection[str]) -> list[str]:
    """The first `count` different captions of a stream of the shapes world that are not excluded.

    Raises:
        ValueError: there are not so many: 48 captions have one shape, 7,680 have two.
    """
    chosen: dict[str, None] = {}
    for index in range(20 * count):
        if len(chosen) == count:
            break
        text = caption(scene(stream, index))
        if text not in excluded:
            chosen[text] = None
    if len(chosen) < count:
        raise ValueError(f"count: {count} prompts are requested, {len(chosen)} are left")
    return list(chosen)


def prompt_sets(trained_on: Source) -> tuple[list[str], list[str]]:
    """Prompts to choose settings on, and prompts to report on: no caption is in both, or among the winners'.

    Of clips there are few captions, so each is there several times, one after the other, for clips of other seeds; and
    settings are chosen on the winners' captions.
    """
    if trained_on.clips:
        seen, kept_back = motion.captions(held_out=False), motion.captions(held_out=True)
        return seen, [caption for caption in kept_back for _ in range(CLIPS_PER_PROMPT)]
    winners = {example.prompt for example in trained_on}
    development = held_out_prompts(DEVELOPMENT, DEVELOPMENT_PROMPTS, winners)
    return development, held_out_prompts(REPORT, REPORT_PROMPTS, winners | set(development))


def judged_pictures(
    family: Family, denoiser: Denoiser, model: nn.Module, sampler: Sampler, prompts: Sequence[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures or clips, as the family makes them, and their scores.

    Args:
        family: the pipeline.
        denoiser: how the model is called.
        model: its network.
        sampler: how pictures are made.
        prompts: captions of the shapes world.
        seed: of the starting noise; picture i starts from noise (seed, i), whatever the model.

    Returns:
        Pictures `(N, 32, 32, 3)` or clips `(N, F, 32, 32, 3)` uint8, and scores `(N,)`: the share of asked-for
        attributes that the judge finds.
    """
    pictures = generate(family, denoiser, model, sampler, prompts, resolution=SIZE, seed=seed)
    return pictures, ShapesScorer()(prompts, pictures)


def judged_model(
    config: Config,
    prompts: Sequence[str],
    seed: int,
    weights: Path | None = None,
    *,
    guidance: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """As `judged_pictures`, of the model of a configuration, or of the `weights` that its run wrote.

    The sampler is the configuration's, at another guidance scale where one is given.
    """
    full = weights is not None and config.model.train == "full"
    # What a run on clips wrote has its motion modules inside.
    model = config.model.model_copy(update={"path": str(weights), "motion_adapter": ""}) if full else config.model
    family = load_family(config.model_copy(update={"model": model}), torch.device("cpu"))
    if weights is not None and not full:
        load_as("weights", str(weights), "a LoRA", partial(family.load_lora, weights))
    denoiser = Denoiser(family, torch.float32)
    settings = config.sampler if guidance is None else config.sampler.model_copy(update={"guidance": guidance})
    sampler = family.sampler(settings, family.latent_shape(SIZE))
    return judged_pictures(family, denoiser, family.model, sampler, prompts, seed)
