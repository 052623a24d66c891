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
        winner: `(n, B)` errors of the policy on the winners of n blocks, or `(B,)` for one block.
        loser: errors of the policy on the losers, of the same shape as the following ones.
        ref_winner: errors of the reference on the winners.
        ref_loser: errors of the reference on the losers.
        weights: `(n, B, B)` omega, a row per winner that sums to 1; see `rpo_weights`.
        beta: strength of the pull to the reference.

    Returns:
        n B losses, one per winner; coefficients `(1, 2 n B)`, winners first. Sums: `loss`; `correct`, the number of
        pairs (the diagonals) whose logit is positive; `diagonal_weight`, the weights of the pairs themselves.
    """
    weights = weights.to(winner)
    margin = (winner - ref_winner)[..., :, None] - (loser - ref_loser)[..., None, :]
    logit = -0.5 * beta * weights * margin
    loss = F.softplus(-logit).mean(-1).flatten()
    slope = 0.5 * beta * weights * logit.neg().sigmoid() / logit.numel()
    own = {"correct": (logit > 0).to(winner), "diagonal_weight": weights}
    sums = {name: values.diagonal(dim1=-2, dim2=-1).sum() for name, values in own.items()}
    coefficients = torch.cat([slope.sum(-1).flatten(), -slope.sum(-2).flatten()])
    return LossRows(loss, coefficients[None], {"loss": loss.sum()} | sums)


def rpo_weights(winner_embeds: Tensor, loser_embeds: Tensor, *, temperature: float) -> Tensor:
    """Computes omega, the softmax over losers j of `cos(E_w,i, E_l,j) / tau`: `(n, B, B)`, whose rows sum to 1.

    Args:
        winner_embeds: `(n, B, D)` embeddings of the winners of n blocks with their prompts, or `(B, D)` for one block.
        loser_embeds: embeddings of the losers with their prompts, of the same shape.
        temperature: tau. The lower it is, the more each winner is compared with its most similar loser alone.
    """
    cosine = F.normalize(winner_embeds, dim=-1) @ F.normalize(loser_embeds, dim=-1).mT
    return (cosine / temperature).softmax(-1)
