"""The preference loss and its gradient in float64, written out by hand, with which both backends are compared.

Also what the tests of the loss share: backends and devices, inputs, tolerances.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from seppo_fast.loss import PreferenceLoss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Backend and device. Triton needs a GPU, or a separate process in interpreter mode (tests/loss/test_interpreter.py).
PLACES = (
    [("triton", "cpu")]
    if INTERPRETED
    else [("torch", "cpu")] + [("torch", "cuda"), ("triton", "cuda")] * torch.cuda.is_available()
)
SHAPES = [(2, 1), (4, 3), (6, 3, 5, 7), (10, 4, 9, 11), (2, 4, 64, 64), (4, 4, 3, 5, 6), (2, 1, 2, 2051)]
# Relative RMS error of a gradient rounded once to the dtype. Triton's interpreter truncates to bfloat16; a GPU rounds.
ROUNDING = {
    torch.float64: 2e-6,
    torch.float32: 2e-6,
    torch.bfloat16: 6e-3 if INTERPRETED else 3e-3,
    torch.float16: 5e-4,
}
LEARN = {"adaptive": -1.0, "indicator": 0.0, "never": 1.0}


@dataclass
class Reference:
    loss: Tensor
    reject: Tensor
    logit: Tensor
    model_error: Tensor
    ref_error: Tensor
    aaf_rate: Tensor
    implicit_acc: Tensor
    difference: Tensor
    grad: Tensor
    preference_loss: Tensor
    sft_loss: Tensor


def reference(
    model_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    *,
    ref_error: Tensor | None = None,
    beta: float = 2000.0,
    flipper: str = "adaptive",
    tie_tol: float = 0.0,
    weights: Tensor | None = None,
    sft_weight: float = 0.0,
    safeguard: float | None = None,
) -> Reference:
    p, y = model_pred.detach().cpu().double(), target.cpu().double()
    if len(y) < len(p):
        y = torch.cat([y, y])
    rows, pairs = len(p), len(p) // 2
    m = ((p - y) ** 2).reshape(rows, -1).sum(1) / p[0].numel()
    if ref_pred is not None:
        r = ((ref_pred.cpu().double() - y) ** 2).reshape(rows, -1).sum(1) / p[0].numel()
    else:
        r = ref_error.cpu().double()
    d = m - r
    reject = torch.tensor([bool(x <= tie_tol) for x in d[:pairs]])
    a = torch.tensor([1.0 if passed else LEARN[flipper] for passed in reject], dtype=torch.float64)
    omega = torch.ones(pairs, dtype=torch.float64) if weights is None else weights.cpu().double()
    logit = -(beta / 2) * omega * (d[:pairs] - a * d[pairs:])
    losses = torch.logaddexp(torch.zeros_like(logit), -logit)
    slope = (beta / 2) * omega / (1 + torch.exp(logit)) / pairs
    sft = sft_weight * (beta / 4)
    each = 2 * (p - y) / p[0].numel()
    room = torch.ones(pairs, dtype=torch.float64)
    for pair in range(pairs if safeguard is not None else 0):
        against = float(a[pair] * (each[pair] * each[pairs + pair]).sum())
        if against > 0:
            room[pair] = min(1.0, (1 - safeguard) * float((each[pair] ** 2).sum()) / against)
    per_row = torch.cat([slope + sft / pairs, -a * room * slope])
    grad = per_row.reshape(-1, *[1] * (p.ndim - 1)) * each
    share = reject.double().mean(), (logit > 0).double().mean()
    parts = {"preference_loss": losses.mean(), "sft_loss": sft * m[:pairs].mean()}
    return Reference(sum(parts.values()), reject, logit, m, r, *share, difference=d, grad=grad, **parts)


def close(actual: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(actual.detach().cpu().double(), expected.double(), rtol=rtol, atol=atol)


def assert_matches(result: PreferenceLoss, expected: Reference, atol: float) -> None:
    """Asserts that loss and statistics match: the logit within `atol` and float32's rounding."""
    close(result.logit, expected.logit, rtol=2e-6, atol=atol)
    close(result.loss, expected.loss, rtol=1e-6, atol=atol)
    close(result.preference_loss, expected.preference_loss, rtol=1e-6, atol=atol)
    close(result.sft_loss, expected.sft_loss, rtol=1e-6)
    close(result.model_error, expected.model_error, rtol=4e-7)
    close(result.ref_error, expected.ref_error, rtol=4e-7)
    close(result.aaf_rate, expected.aaf_rate, rtol=1e-7)
    close(result.implicit_acc, expected.implicit_acc, rtol=1e-7)
    assert torch.equal(result.reject.cpu(), expected.reject)
    numbers = ("loss", "logit", "model_error", "ref_error", "aaf_rate", "implicit_acc", "preference_loss", "sft_loss")
    for field in numbers:
        assert getattr(result, field).dtype == torch.float32


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Returns the RMS of the difference, divided by the RMS of the expected values."""
    return float((actual.detach().cpu().double() - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def predictions(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    apart: float = 0.02,
    shared: bool = False,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns policy predictions, target and reference predictions, `apart` RMS from the policy's; errors near 0.2."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape[0]
    target = torch.randn((rows // 2, *shape[1:]), generator=generator)
    target = target if shared else torch.cat([target, torch.randn(target.shape, generator=generator)])
    both = torch.cat([target, target]) if shared else target
    ref_pred = both + 0.45 * torch.randn(shape, generator=generator)
    model_pred = ref_pred + apart * torch.randn(shape, generator=generator)
    return model_pred.to(device, dtype).requires_grad_(), target.to(device, dtype), ref_pred.to(device, dtype)
