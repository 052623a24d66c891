"""The launches that test_launcher.py checks. Run as a module under `stub_driver.environment`, it makes and prints them.

Sizes are small, and rows and clips have gaps, so that strides and sizes differ and a wrong order of arguments shows.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

import seppo_fast.kernels.denoising_error as errors
import seppo_fast.kernels.preference as preference
import seppo_fast.kernels.temporal_attention as temporal
from seppo_fast.kernels.eager import LossForm

PAIRS = 3
ONE_CHUNK, CHUNKS = (4, 16, 24), (4, 64, 80)  # one fold of 2048 lanes; two chunks of five folds
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
# Head widths in AnimateDiff's motion modules, which have 8 heads. Not every combination, since compiling takes seconds.
WIDTHS = [
    *((width, torch.bfloat16) for width in (40, 80, 160)),
    (80, torch.float16),
    (40, torch.float32),
]
CLIPS, FRAMES, POSITIONS, HEADS = 2, 16, 24, 8
LAYOUTS = {"frames outside": "BFP", "frames inside": "BPF"}  # the dims in memory, outermost first
FORWARD, BACKWARD, ERRORS = "_preference_fwd_kernel", "_errors_bwd_kernel", "_errors_fwd_kernel"
TEMPORAL, TEMPORAL_BACKWARD = "_temporal_fwd_kernel", "_temporal_bwd_kernel"


@dataclass(frozen=True)
class Case:
    """A call, and the kernels that it launches, each with its number of programs."""

    call: Callable[[], Any]
    launches: dict[str, int]


def _rows(rows: int, latent: tuple[int, ...], dtype: torch.dtype, gap: int) -> Tensor:
    """Returns (rows, N) with a gap after each row."""
    size = latent[0] * latent[1] * latent[2]
    return torch.zeros(rows, size + gap, dtype=dtype)[:, :size]


def _latents(latent: tuple[int, ...], dtype: torch.dtype, permuted: bool, separate: bool) -> tuple[Tensor, Tensor]:
    """Returns a prediction's rows and a target; if permuted, the target's dims are in the order of channels_last."""
    pred = _rows(2 * PAIRS, latent, dtype, 16).requires_grad_()
    target = _rows(2 * PAIRS if separate else PAIRS, latent, dtype, 32)
    return pred, target.unflatten(1, latent).permute(0, 2, 3, 1) if permuted else target


def _blocks(latent: tuple[int, ...], separate: bool) -> int:
    """Returns the number of programs of the kernel that writes gradients."""
    return (2 * PAIRS if separate else PAIRS) * (1 if latent == ONE_CHUNK else 10)


def _preference(
    dtype: torch.dtype,
    chunks: bool,
    ref_error: bool,
    at_once: bool,
    weights: bool,
    scale_tensor: bool,
    permuted: bool,
    separate: bool,
) -> Case:
    """Returns a call of the loss: with its gradient at once, through autograd (if `scale_tensor`), or alone."""
    latent = CHUNKS if chunks else ONE_CHUNK

    def call() -> None:
        pred, target = _latents(latent, dtype, permuted, separate)
        ref_pred = None if ref_error else _rows(2 * PAIRS, latent, dtype, 48)
        inputs = (
            pred, target, ref_pred, torch.zeros(2 * PAIRS) if ref_error else None,
            torch.ones(PAIRS) if weights else None,
            LossForm(20.0, -1.0, 1e-3, *((3.0, 0.75) if weights else ())),
        )  # fmt: skip
        if at_once:
            scale = torch.tensor(3.0) if scale_tensor else 3.0
            preference.loss_and_grad(*inputs, scale, _rows(2 * PAIRS, latent, dtype, 64))
        elif scale_tensor:
            torch.autograd.grad(preference.preference(*inputs)[0], pred, torch.tensor(3.0))
        else:
            with torch.no_grad():
                preference.preference(*inputs)

    launched = {FORWARD: PAIRS * (2 if chunks else 1)}
    if chunks if at_once else scale_tensor:
        launched[BACKWARD] = _blocks(latent, separate)
    return Case(call, launched)


def _preferences() -> dict[str, Case]:
    """Returns eight of the 128 combinations of choices, so that every two choices occur in all four combinations."""
    names = ("chunks", "ref_error", "at_once", "weights", "scale_tensor", "permuted", "separate")
    cases = {}
    for number, (a, b, c) in enumerate(product([False, True], repeat=3)):
        choices = dict(zip(names, (a, b, c, a ^ b, a ^ c, b ^ c, a ^ b ^ c), strict=True))
        chosen = [name for name, choice in choices.items() if choice]
        cases[", ".join(["preference", *chosen])] = _preference(DTYPES[number % 3], **choices)
    return cases


def _errors(dtype: torch.dtype, latent: tuple[int, ...], permuted: bool, separate: bool) -> Case:
    def call() -> None:
        pred, target = _latents(latent, dtype, permuted, separate)
        torch.autograd.grad(errors.denoising_errors(pred, target), pred, torch.ones(2 * PAIRS))

    return Case(call, {ERRORS: 2 * PAIRS, BACKWARD: _blocks(latent, separate)})


def _errors_far_apart() -> None:
    """Launches on rows whose stride needs 64 bits. Memory that is never touched costs nothing."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16)
    errors.denoising_errors(
        memory.as_strided((2, 32), (2**31 + 16, 1)), torch.zeros(2, 48, dtype=torch.float16)[:, :32]
    )


def _clips(order: str, width: int, dtype: torch.dtype, gap: int) -> Tensor:
    """Returns (B, F, P, H, D) whose dims B, F and P have the given order in memory, with a gap after the innermost."""
    sizes = {"B": CLIPS, "F": FRAMES, "P": POSITIONS}
    memory = torch.zeros(*(sizes[dim] for dim in order), HEADS * width + gap, dtype=dtype)
    places = [order.index(dim) for dim in "BFP"]
    return memory[..., : HEADS * width].unflatten(-1, (HEADS, width)).permute(*places, 3, 4)


def _temporal(dtype: torch.dtype, width: int, orders: tuple[str, str, str, str]) -> Case:
    """Returns a call of attention over frames and its gradient; the orders are those of q, k, v and the gradient."""

    def call() -> None:
        q, k, v, grad = (_clips(order, width, dtype, 16 * gap) for gap, order in enumerate(orders, 1))
        tracked = [x.requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(temporal.temporal_attention(*tracked), tracked, grad)

    items = CLIPS * POSITIONS * HEADS
    programs = items // ({40: 4, 80: 4, 160: 2}[width] if dtype in HALF else 1)
    return Case(call, {TEMPORAL: programs, TEMPORAL_BACKWARD: programs})


CASES = {
    **_preferences(),
    "errors": _errors(torch.float16, ONE_CHUNK, False, False),
    "errors, chunks, permuted, separate": _errors(torch.float32, CHUNKS, True, True),
    "errors, rows beyond 2^31 elements": Case(_errors_far_apart, {ERRORS: 2}),
    **{
        f"temporal, {name}, {width}, {str(dtype).removeprefix('torch.')}": _temporal(dtype, width, (order,) * 4)
        for (width, dtype), (name, order) in product(WIDTHS, LAYOUTS.items())
    },
    # Gradients are dense in the layouts of q, k and v, so their strides differ here.
    "temporal, three layouts": _temporal(torch.bfloat16, 40, ("BFP", "PBF", "FPB", "BFP")),
}
SWAPPED = "errors"  # the case that is also launched by a faulty launcher


def main() -> None:
    """Prints, as JSON, the records of all cases, those of one case with a faulty launcher, and the warnings."""
    from tests.kernels.stub_driver import recorded

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        right = {name: recorded(case.call) for name, case in CASES.items()}
        swapped = recorded(CASES[SWAPPED].call, swapped=True)
    json.dump({"right": right, "swapped": swapped, "warnings": [str(warning.message) for warning in told]}, sys.stdout)


if __name__ == "__main__":
    main()
