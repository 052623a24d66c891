"""MaPO: fine-tuning on winners with a margin to the losers, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seppo_fast.methods.losses.rows import LossRows

_SMALL = 1e-3  # below it the series is exact in float64, and the closed form loses digits


def mapo(winner: Tensor, loser: Tensor, *, beta: float, q: float, steps: float) -> LossRows:
    """Computes `m_w + beta softplus(-T (f(m_w) - f(m_l)))`, `f(m) = q m / expm1(q m)` (MaPO).

    f falls from 1 at an error of 0, and stands for the likelihood ratio. As T is 1000, the logit saturates at errors
    that differ by much more than 1e-3: half of the rows may train on the winner's error alone.

    Args:
        winner: `(B,)` errors of the policy on the winners.
        loser: `(B,)` errors of the policy on the losers.
        beta: strength of the margin.
        q: scale of the errors in f.
        steps: T, the factor on the margin: the number of timesteps.

    Returns:
        B losses; coefficients `(1, 2B)`, winners first. Sums: `loss`; `winner_error` and `loser_error`; `ratio_margin`,
        f(m_w) - f(m_l); `margin_loss`, the second term; `correct`, margins above 0; `saturated`, rows with
        |logit| above 10.
    """
    win, f_win, slope_win = _ratio(winner, q)
    lose, f_lose, slope_lose = _ratio(loser, q)
    margin = f_win - f_lose
    logit = steps * margin
    penalty = beta * F.softplus(-logit)
    loss = win + penalty
    pull = beta * steps * logit.neg().sigmoid()
    coefficients = torch.cat([1 - pull * slope_win, pull * slope_lose]) / len(loss)
    sums = {
        "loss": loss,
        "winner_error": win,
        "loser_error": lose,
        "ratio_margin": margin,
        "margin_loss": penalty,
        "correct": margin > 0,
        "saturated": logit.abs() > 10,
    }
    return LossRows(
        loss.to(winner.dtype),
        coefficients.to(winner.dtype)[None],
        {name: value.sum(dtype=torch.float64).to(winner.dtype) for name, value in sums.items()},
    )


def _ratio(error: Tensor, q: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the error m, `f(m) = x / expm1(x)` with `x = q m`, and f'(m), in float64."""
    m = error.double()
    x = q * m
    small = x < _SMALL
    large = x.where(~small, 1.0)  # keeps 0/0 out of the branch that is not taken
    f = torch.where(small, 1 - x / 2 + x.square() / 12, large / torch.expm1(large))
    # (expm1 - x e^x) / expm1^2, in a form that does not overflow
    slope = torch.where(small, x / 6 - 0.5 - x**3 / 180, (1 + large / torch.expm1(-large)) / torch.expm1(large))
    return m, f, q * slope
