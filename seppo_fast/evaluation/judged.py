"""Scores a model with the judge of the embedded shapes world, on prompts and seeds reserved for evaluation."""

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

# Each number is both a stream of the shapes world and the seed of the starting noise. Settings are chosen on the first.
DEVELOPMENT, REPORT = 1001, 2002
DEVELOPMENT_PROMPTS, REPORT_PROMPTS = 400, 1200
CLIPS_PER_PROMPT = 4


def held_out_prompts(stream: int, count: int, excluded: Collection[str]) -> list[str]:
    """Returns the first `count` distinct captions of a stream of the shapes world that are not excluded.

    Raises:
        ValueError: too few are found. The world has 48 captions with one shape and 7,680 with two.
    """
    chosen: dict[str, None] = {}
    for index in range(20 * count):
        if len(chosen) == count:
            break
        text = caption(scene(stream, index))
        if text not in excluded:
            chosen[text] = None
    if len(chosen) < count:
        raise ValueError(f"count: {count} prompts are requested, but only {len(chosen)} are left")
    return list(chosen)


def prompt_sets(trained_on: Source) -> tuple[list[str], list[str]]:
    """Returns prompts to choose settings on, and prompts to report on, which share no caption.

    For pictures, neither contains a caption of the winners. Clips have few captions, so settings are chosen on those of
    the winners, and each held-out caption is repeated `CLIPS_PER_PROMPT` times in a row; each repetition starts from
    other noise.
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
    """Generates one picture or clip per prompt, and scores them.

    Args:
        family: the model family.
        denoiser: runs the network.
        model: the network to sample from.
        sampler: the solver and guidance to use.
        prompts: captions of the shapes world.
        seed: seed of the starting noise; picture i starts from noise (seed, i) for every model.

    Returns:
        Pictures `(N, 32, 32, 3)` or clips `(N, F, 32, 32, 3)` uint8, and scores `(N,)`: the share of the attributes in
        the prompt that the judge finds.
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
    """Loads a model on the CPU in float32, generates pictures or clips with it, and scores them.

    Args:
        config: the configuration that names the model and its sampler.
        prompts: captions of the shapes world.
        seed: seed of the starting noise.
        weights: the folder of weights that a run with this configuration wrote; None: the base model.
        guidance: the guidance scale; None: the configuration's.

    Returns:
        As `judged_pictures`.
    """
    full = weights is not None and config.model.train == "full"
    # Full weights of a run on clips contain the motion modules.
    model = config.model.model_copy(update={"path": str(weights), "motion_adapter": ""}) if full else config.model
    family = load_family(config.model_copy(update={"model": model}), torch.device("cpu"))
    if weights is not None and not full:
        load_as("weights", str(weights), "a LoRA", partial(family.load_lora, weights))
    denoiser = Denoiser(family, torch.float32)
    settings = config.sampler if guidance is None else config.sampler.model_copy(update={"guidance": guidance})
    sampler = family.sampler(settings, family.latent_shape(SIZE))
    return judged_pictures(family, denoiser, family.model, sampler, prompts, seed)
