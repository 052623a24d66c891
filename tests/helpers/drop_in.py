"""The loss block of Diffusion-DPO trainers, before and after the drop-in; the documented diff shows these lines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seppo_fast.loss import seppo_loss


def seppo_before(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta_dpo: float) -> tuple[Tensor, Tensor]:
    model_losses = (model_pred.float() - target.float()).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    ref_losses = (ref_pred.float() - target.float()).pow(2).mean(dim=[1, 2, 3])
    ref_losses_w, ref_losses_l = ref_losses.chunk(2)
    diff_w = model_losses_w - ref_losses_w
    diff_l = model_losses_l - ref_losses_l
    sign = torch.where(diff_w > 0, 1.0, -1.0)
    inside_term = -0.5 * beta_dpo * (diff_w + sign * diff_l)
    implicit_acc = (inside_term > 0).float().mean()
    loss = -F.logsigmoid(inside_term).mean()
    return loss, implicit_acc


def seppo_after(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta_dpo: float) -> tuple[Tensor, Tensor]:
    result = seppo_loss(model_pred, ref_pred, target, beta_dpo)
    loss, implicit_acc = result.loss, result.implicit_acc
    return loss, implicit_acc
