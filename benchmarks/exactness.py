"""Measures what rounding does to the loss at beta 2000: `python -m benchmarks.exactness`, under a minute on two cores.

Latents are synthetic and have SD-1.5's size; denoising errors are near 0.2. Target and the reference's prediction are
in half precision, as in the public Diffusion-DPO script. The policy's prediction is in float32, at an RMS distance of
`apart` from the reference's, or equal to it. Every recipe gets the same numbers; the truth is their loss in float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.provenance import device, provenance
from seppo_fast.loss import denoising_errors, preference_loss

BETA = 2000.0
LATENT = (4, 64, 64)
APART = (1e-2, 1e-3, 0.0)
TIE = 2e-7  # closer to a tie, no sign is promised; but equal predictions must tie exactly, and a tie rejects
_BATCH = 16  # pairs

Pairs = tuple[Tensor, Tensor, Tensor]
Recipe = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def pairs_apart(count: int, apart: float, dtype: torch.dtype, seed: int, latent: tuple[int, ...] = LATENT) -> Pairs:
    """Returns policy predictions (2B, *latent) in float32, and targets and reference predictions in `dtype`.

    Args:
        count: number of pairs B.
        apart: RMS distance of the policy's predictions from the reference's.
        dtype: dtype of the targets and the reference's predictions.
        seed: seed of all random numbers.
        latent: shape of a latent.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * count, *latent)
    target = torch.randn(shape, generator=generator).to(dtype)
    ref_pred = (target + 0.45 * torch.randn(shape, generator=generator)).to(dtype)
    return ref_pred.float() + apart * torch.randn(shape, generator=generator), target, ref_pred


def anchor_and_logit(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `D_w <= 0` and `-(beta/2)(D_w - a D_l)` of each pair (SePPO, appendix B.2), in the dtype of D (2B,)."""
    winner, loser = difference.chunk(2)
    reject = winner <= 0
    return reject, -0.5 * BETA * (winner - torch.where(reject, 1.0, -1.0) * loser)


def truth(model_pred: Tensor, target: Tensor, ref_pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns anchor test, logit and D_w of each pair, computed in float64."""
    p, y, q = model_pred.double(), target.double(), ref_pred.double()
    difference = ((p - y).square() - (q - y).square()).flatten(1).mean(1)
    return *anchor_and_logit(difference), difference.chunk(2)[0]


def public_recipe(model_pred: Tensor, target: Tensor, ref_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Computes policy errors in float32 and reference errors in the reference's dtype, as the Diffusion-DPO script."""
    model_error = (model_pred - target).pow(2).mean(dim=[1, 2, 3])
    ref_error = (ref_pred - target).pow(2).mean(dim=[1, 2, 3])
    return anchor_and_logit(model_error - ref_error)


def float32_means(model_pred: Tensor, target: Tensor, ref_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Computes both errors in float32 and subtracts them: appendix B.2 as written."""
    return public_recipe(model_pred.float(), target.float(), ref_pred.float())


def from_errors(model_pred: Tensor, target: Tensor, ref_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Computes ours, with reference errors made ahead."""
    ref_error = denoising_errors(ref_pred, target)
    result = preference_loss(model_pred, target, ref_error=ref_error, beta=BETA)
    return result.reject, result.logit


def from_predictions(model_pred: Tensor, target: Tensor, ref_pred: Tensor) -> tuple[Tensor, Tensor]:
    """Computes ours, with the reference's predictions."""
    result = preference_loss(model_pred, target, ref_pred, beta=BETA)
    return result.reject, result.logit


RECIPES: dict[str, tuple[Recipe, torch.dtype]] = {
    "public recipe, bf16": (public_recipe, torch.bfloat16),
    "public recipe, fp16": (public_recipe, torch.float16),
    "means in float32, subtracted": (float32_means, torch.bfloat16),
    "`ref_error`, ours": (from_errors, torch.bfloat16),
    "`ref_pred`, ours": (from_predictions, torch.bfloat16),
}


def measure(name: str, apart: float, count: int, device: torch.device) -> dict[str, Any]:
    """Returns one row: a recipe's share of wrong signs and its logit errors, over `count` pairs in full batches."""
    recipe, dtype = RECIPES[name]
    wrong, errors = [], []
    for seed in range(count // _BATCH):
        inputs = [x.to(device) for x in pairs_apart(_BATCH, apart, dtype, seed)]
        reject, logit, difference = truth(*inputs)
        promised = torch.ones_like(reject) if apart == 0 else difference.abs() >= TIE
        found_reject, found_logit = recipe(inputs[0], inputs[1], inputs[2])
        wrong.append((found_reject != reject)[promised])
        errors.append((found_logit.double() - logit)[promised])
    error = torch.cat(errors)
    return {
        "recipe": name,
        "apart": apart,
        "promised": len(error),
        "wrong_signs": float(torch.cat(wrong).double().mean()),
        "rms_logit_error": float(error.square().mean().sqrt()),
        "worst_logit_error": float(error.abs().max()),
    }


def exactness(count: int) -> dict[str, Any]:
    """Returns the rows of every recipe at every distance, with provenance."""
    started = time.perf_counter()
    origin = provenance("benchmarks.exactness")
    rows = [measure(name, apart, count, device()) for name in RECIPES for apart in APART]
    seconds = time.perf_counter() - started
    return {**origin, "seconds": seconds, "pairs": count, "beta": BETA, "latent": LATENT, "rows": rows}


def exactness_table(result: dict[str, Any]) -> str:
    """Returns a Markdown table with one line per recipe: wrong signs and logit errors at each distance."""
    rows = {(row["recipe"], row["apart"]): row for row in result["rows"]}
    names = list(dict.fromkeys(row["recipe"] for row in result["rows"]))
    distances = [f"{apart:g} apart" if apart else "equal" for apart in APART]
    head = [f"wrong signs, {distance}" for distance in distances] + [f"logit, {distance}" for distance in distances]
    lines = [f"| the reference's error | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name in names:
        of_name = [rows[name, apart] for apart in APART]
        cells = [f"{row['wrong_signs']:.1%}" for row in of_name]
        cells += [f"{row['rms_logit_error']:.1g} ({row['worst_logit_error']:.1g})" for row in of_name]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Share of pairs whose anchor test is wrong, and RMS (worst) error of the logit, compared with float64. The "
        f"predictions of policy and reference are {APART[0]:g} or {APART[1]:g} RMS apart, or equal. "
        f"`{result['command']}`: "
        f"{result['pairs']} pairs, latents of {' x '.join(map(str, result['latent']))}, beta {result['beta']:g}, "
        f"{result['device']}, torch {result['torch']}, commit {result['commit']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes the result to the requested file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    result = exactness(count=2048)
    print(exactness_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
