"""Makes the shipped pictures of `data.source: shapes-made:N`: `python -m benchmarks.shapes_world.make_pictures`.

The embedded pipeline makes four pictures of each prompt, sampled as in `demo.yaml`, and the exact judge scores them as
they will be decoded. The latents of the best of the four are kept, and those of one of the other three. So winners and
losers come from one model, as in Pick-a-Pic. None of the prompts is among those that `prompt_sets` returns for these
pictures. Of those that it returns for `shapes:2048:11`, 17 for choosing settings and 28 for reporting are among them;
the ablation leaves these out. Everything is determined by the seed, up to the machine's rounding.

The shipped file was made with torch 2.13.0+cpu on one thread. Mean scores: 0.8205 of all 4096 pictures, 0.9745 of the
best, 0.7789 of the others. For 342 prompts both kept pictures have the same score.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from seppo_fast.config.load import read_config
from seppo_fast.config.schema import Config
from seppo_fast.evaluation.judged import (
    DEVELOPMENT,
    DEVELOPMENT_PROMPTS,
    REPORT,
    REPORT_PROMPTS,
    held_out_prompts,
)
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.family import Family
from seppo_fast.models.registry import load_family
from seppo_fast.scorers.shapes import ShapesScorer
from seppo_fast.shapes import MADE
from seppo_fast.shapes.world import SIZE
from seppo_fast.utils.random import keyed_noise, keyed_rng

STREAM = 4004  # random stream of the prompts
PROMPTS, TAKES = 1024, 4
SEED = 0


def prompts_apart(count: int) -> list[str]:
    """Returns `count` distinct captions from a separate stream, none of them held out by `evaluation.judged`."""
    development = held_out_prompts(DEVELOPMENT, DEVELOPMENT_PROMPTS, ())
    report = held_out_prompts(REPORT, REPORT_PROMPTS, set(development))
    return held_out_prompts(STREAM, count, {*development, *report})


def make_latents(config: Config, family: Family, prompts: Sequence[str]) -> Tensor:
    """Returns latents of the embedded pipeline's pictures, `(len(prompts), TAKES, *latent)` float16.

    Args:
        config: a configuration, of which the sampler is used.
        family: the pipeline.
        prompts: captions.
    """
    shape = family.latent_shape(SIZE)
    sampler, denoiser = family.sampler(config.sampler, shape), Denoiser(family, torch.float32)
    keys = [(row, take) for row in range(len(prompts)) for take in range(TAKES)]
    empty, *rows = family.encode_prompts(["", *prompts])
    conditioning = family.collate([rows[row] for row, _ in keys])
    noise = keyed_noise(SEED, "made", keys, shape)
    latents = denoiser.sample(family.model, sampler, noise, conditioning, empty)
    return latents.half().unflatten(0, (len(prompts), TAKES))


def choose(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns which takes to keep, `(2, N)`, by their scores `(N, TAKES)`: the best one and another.

    If several are best, the first of them in a random order is kept. The other is any of the rest, whatever its score.
    """
    chosen = []
    for row, own in enumerate(scores):
        rng = keyed_rng(SEED, "made, chosen", row)
        order = rng.permutation(len(own))
        best = order[own[order].argmax()]
        chosen.append((best, rng.choice(order[order != best])))
    return np.array(chosen).T


def make(output: Path) -> None:
    """Writes the file and prints a summary of its contents."""
    began = time.monotonic()
    config = read_config("demo.yaml")
    family = load_family(config, torch.device("cpu"))
    prompts = prompts_apart(PROMPTS)
    latents = make_latents(config, family, prompts)
    pictures = family.decode(latents.flatten(0, 1).float())
    repeated = [prompt for prompt in prompts for _ in range(TAKES)]
    scores = ShapesScorer()(repeated, pictures).reshape(PROMPTS, TAKES)
    best, other = choose(scores)
    rows = np.arange(PROMPTS)
    save_file(
        {
            "best": latents[rows, best],
            "other": latents[rows, other],
            "best_score": torch.from_numpy(scores[rows, best]).float(),
            "other_score": torch.from_numpy(scores[rows, other]).float(),
        },
        output,
        {"prompts": json.dumps(prompts)},
    )
    ties = (scores[rows, best] == scores[rows, other]).sum()
    print(
        f"{output}: {output.stat().st_size} bytes, {time.monotonic() - began:.0f} s; mean score {scores.mean():.4f}, "
        f"of the best {scores[rows, best].mean():.4f}, of the other {scores[rows, other].mean():.4f}; {ties} ties"
    )


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=MADE, help="the file to write; by default the shipped one")
    make(parser.parse_args().output)


if __name__ == "__main__":
    main()
