"""Diffusion-RPO: every winner of a block of pairs against every loser of it, weighted by how alike they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seppo_fast.methods.losses.rows import LossRows


def rpo(
    winner: Tensor, loser: Tensor, ref_winner: Tensor, ref_loser: Tensor, weights: Tensor, *, beta: float
) -> LossRows:
    """Computes `mean_j softplus(omega_ij (beta/2) (D_w,i - D_l,j))` for each winner i of a block of B pairs.

    (The form is that of RPO's code for language; Diffusion-RPO has published none.) The weight multiplies the logit,
    not the loss. A block of one pair is Diffusion-DPO. With several, most of the B^2 weights are small, so that the
    pull of beta falls as the block grows: the size of the block is part of the objective, and must not follow from what
    fits in memory.

    Args:
        winner: `(B,)` errors of the policy on the winners.
        loser: `(B,)` errors of the policy on the losers.
        ref_winner: `(B,)` errors of the reference on the winners.
        ref_loser: `(B,)` errors of the reference on the losers.
        weights: `(B, B)` omega, a row per winner that sums to 1; see `rpo_weights`.
        beta: strength of the pull to the reference.

    Returns:
        B losses, one per winner; coefficients `(1, 2B)`, winners first. Sums: `loss`; `correct`, the number of pairs
        (the diagonal) whose logit is positive.
    """
    weights = weights.to(winner)
    margin = (winner - ref_winner)[:, None] - (loser - ref_loser)[None, :]
    logit = -0.5 * beta * weights * margin
    loss = F.softplus(-logit).mean(1)
    slope = 0.5 * beta * weights * logit.neg().sigmoid() / logit.numel()
    sums = {"loss": loss.sum(), "correct": (logit.diagonal() > 0).to(winner).sum()}
    return LossRows(loss, torch.cat([slope.sum(1), -slope.sum(0)])[None], sums)


def rpo_weights(winner_embeds: Tensor, loser_embeds: Tensor, *, temperature: float) -> Tensor:
    """Computes omega, the softmax over losers j of `cos(E_w,i, E_l,j) / tau`: `(B, B)` with rows that sum to 1.

    Args:
        winner_embeds: `(B, D)` embeddings of the winners with their prompts.
        loser_embeds: `(B, D)` embeddings of the losers with their prompts.
        temperature: tau. The lower it is, the more each winner is compared with its most similar loser alone.
    """
    cosine = F.normalize(winner_embeds, dim=1) @ F.normalize(loser_embeds, dim=1).T
    return (cosine / temperature).softmax(1)
