"""The clipped policy gradient on reverse steps: DDPO and GRPO."""

from __future__ import annotations

import torch
from torch import Tensor

from seppo_fast.methods.losses.rows import LossRows, with_pull


def ddpo(error: Tensor, old_error: Tensor, kappa: Tensor, advantage: Tensor, *, clip: float) -> LossRows:
    """Computes `max(-A rho, -A clip(rho, 1 - c, 1 + c))` with `rho = exp(-kappa (e - e_old))` (DDPO).

    The log-probability is a mean over the latent, as in the public codes, which is why clip ranges are as small as
    1e-4. The slope is zero where clipping has removed the row's influence. Exactly at a clip it is not.

    Args:
        error: `(b,)` errors of the policy against the steps' pseudo-targets; see `seppo_fast.diffusion.steps`.
        old_error: `(b,)` errors of the weights that made the steps. At equal weights they must be the same bit for bit.
        kappa: `(b,)` the steps' kappa.
        advantage: `(b,)` how much better than expected each row's sample is.
        clip: c, the distance from 1 at which the ratio is clipped.

    Returns:
        One loss and one row of coefficients per row. Sums: `loss`; `clipped`, ratios outside [1 - c, 1 + c], whichever
        sign the advantage has; `log_ratio_square`.
    """
    kappa, advantage = kappa.to(error), advantage.to(error)
    log_ratio = -kappa * (error - old_error)
    excess = torch.expm1(log_ratio)  # rho - 1, which float32 would round to multiples of 1e-7 if computed from rho
    loss = -advantage * (1 + excess)
    loss = torch.maximum(loss, -advantage * (1 + excess.clamp(-clip, clip)))
    silent = ((advantage > 0) & (excess > clip)) | ((advantage < 0) & (excess < -clip))
    slope = (advantage * (1 + excess) * kappa).masked_fill(silent, 0.0) / len(error)
    sums = {
        "loss": loss.sum(),
        "clipped": (excess.abs() > clip).to(error).sum(),
        "log_ratio_square": log_ratio.square().sum(),
    }
    return LossRows(loss, slope[None], sums)


def grpo(
    error: Tensor,
    old_error: Tensor,
    ref_gap: Tensor,
    kappa: Tensor,
    advantage: Tensor,
    *,
    clip: float,
    kl: float,
) -> LossRows:
    """Computes DDPO's loss plus `kl` times the KL divergence of each step from the reference's (Flow-GRPO).

    The divergence is `mean (mu - mu_ref)^2 / (2 sigma^2) = kappa mean (p - p_ref)^2`, with the whole variance of the
    step. The second row of coefficients belongs to the target p_ref.

    Args:
        error: see `ddpo`, as for the other arguments not listed here.
        old_error: see `ddpo`.
        ref_gap: `(b,)` mean squared difference of the policy's prediction and the reference's.
        kappa: see `ddpo`.
        advantage: see `ddpo`; relative to the group of samples of the same prompt.
        clip: see `ddpo`.
        kl: strength of the pull to the reference.

    Returns:
        As `ddpo`, with two rows of coefficients, and `kl` among the sums, with its strength.
    """
    return with_pull(ddpo(error, old_error, kappa, advantage, clip=clip), "kl", ref_gap, kl * kappa.to(error))
