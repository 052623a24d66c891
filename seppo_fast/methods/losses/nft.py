"""DiffusionNFT: reinforcement by the forward process, as two denoising errors against pseudo-targets."""

from __future__ import annotations

import torch
from torch import Tensor

from seppo_fast.methods.losses.rows import LossRows

_FLOOR = 1e-5  # the least mean |v+ - v| that a loss is divided by
_SCALE = 5.0  # the public code's factor on the loss, its clip range of advantages


def nft_targets(target: Tensor, old: Tensor, *, mix: float) -> tuple[Tensor, Tensor]:
    """Returns the pseudo-targets T+ and T- of the implicit positive and negative policy (DiffusionNFT).

    With v+ = (1 - b) v_old + b p and v- = (1 + b) v_old - b p for a prediction p, `v+ - v = b (p - T+)` and
    `v- - v = -b (p - T-)`, so that `T+ = (v - (1 - b) v_old) / b` and `T- = ((1 + b) v_old - v) / b`.

    Args:
        target: v, the ordinary regression target: `(b, *latent)`.
        old: v_old, the prediction of the weights that sampled: `(b, *latent)`.
        mix: b, the step from the old policy; 1 as published for one reward.
    """
    return (target - (1 - mix) * old) / mix, ((1 + mix) * old - target) / mix


def nft(
    error_plus: Tensor,
    error_minus: Tensor,
    mean_abs_plus: Tensor,
    mean_abs_minus: Tensor,
    optimality: Tensor,
    *,
    mix: float,
) -> LossRows:
    """Computes `5 [q l(v+) + (1 - q) l(v-)] / b` with `l(v') = mean (v' - v)^2 / max(mean |v' - v|, 1e-5)`.

    (DiffusionNFT, as its public code has it.) The divisor carries no gradient. The errors are those of the prediction
    itself. The public code takes them of x_0, which for flow matching is the same up to the factor t in each row's
    weight; with epsilon-prediction it would be a factor of up to 14.6 at the noisy end.

    Args:
        error_plus: `(b,)` mean squared errors of the policy's prediction against T+; see `nft_targets`.
        error_minus: `(b,)` errors against T-.
        mean_abs_plus: `(b,)` mean absolute errors against T+.
        mean_abs_minus: `(b,)` mean absolute errors against T-.
        optimality: `(b,)` q from 0 to 1, how good each row's sample is. At 1 this is fine-tuning on the sample; at 1/2
            and equal weights the two halves cancel.
        mix: see `nft_targets`.

    Returns:
        One loss per row and two rows of coefficients, for T+ and T-. Sums: `loss`; `positive_loss` and `negative_loss`,
        its two parts.
    """
    optimality = optimality.to(error_plus)
    shares = optimality, 1 - optimality
    divisors = [(mix * mean_abs).clamp(min=_FLOOR) for mean_abs in (mean_abs_plus, mean_abs_minus)]
    slopes = [_SCALE * mix * share / divisor for share, divisor in zip(shares, divisors, strict=True)]
    positive, negative = slopes[0] * error_plus, slopes[1] * error_minus
    loss = positive + negative
    sums = {"loss": loss.sum(), "positive_loss": positive.sum(), "negative_loss": negative.sum()}
    return LossRows(loss, torch.stack(slopes) / len(loss), sums)
