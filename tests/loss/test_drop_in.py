"""A trainer in the style of Diffusion-DPO's, before and after its loss block is replaced by ours."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seppo_fast.loss import dpo_loss
from tests.helpers.drop_in import seppo_after, seppo_before

Block = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def dpo_before(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta_dpo: float) -> tuple[Tensor, Tensor]:
    model_losses = (model_pred.float() - target.float()).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses.chunk(2)
    ref_losses = (ref_pred.float() - target.float()).pow(2).mean(dim=[1, 2, 3])
    ref_losses_w, ref_losses_l = ref_losses.chunk(2)
    model_diff = model_losses_w - model_losses_l
    ref_diff = ref_losses_w - ref_losses_l
    inside_term = -0.5 * beta_dpo * (model_diff - ref_diff)
    implicit_acc = (inside_term > 0).float().mean()
    loss = -F.logsigmoid(inside_term).mean()
    return loss, implicit_acc


def dpo_after(model_pred: Tensor, ref_pred: Tensor, target: Tensor, beta_dpo: float) -> tuple[Tensor, Tensor]:
    result = dpo_loss(model_pred, ref_pred, target, beta_dpo)
    loss, implicit_acc = result.loss, result.implicit_acc
    return loss, implicit_acc


class TinyUNet(nn.Module):
    """A small network with the inputs of a UNet: noisy latents, timesteps, prompt embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.time = nn.Linear(1, 16)
        self.prompt = nn.Linear(6, 16)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
        condition = self.time(timesteps[:, None] / 1000) + self.prompt(prompt_embeds.mean(1))
        return self.conv_out(F.silu(self.conv_in(noisy_latents) + condition[:, :, None, None]))


def train(block: Block, beta_dpo: float = 500.0, updates: int = 8, accumulation: int = 2) -> dict[str, list[Tensor]]:
    """Trains a tiny UNet against its own past; returns losses, accuracies, gradient norms and the final weights."""
    torch.manual_seed(0)
    unet = TinyUNet()
    ref_unet = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    signal = torch.linspace(0.999, 0.05, 1000)
    log: dict[str, list[Tensor]] = {"loss": [], "implicit_acc": [], "grad_norm": []}
    for update in range(updates):
        for _ in range(accumulation):
            latents = torch.randn(8, 4, 6, 6)  # winners, then losers
            noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
            timesteps = torch.randint(0, 1000, (4,)).repeat(2)
            prompt_embeds = torch.randn(4, 5, 6).repeat(2, 1, 1)
            level = signal[timesteps][:, None, None, None]
            noisy_latents = level.sqrt() * latents + (1 - level).sqrt() * noise
            target = noise

            model_pred = unet(noisy_latents, timesteps, prompt_embeds)
            with torch.no_grad():
                ref_pred = ref_unet(noisy_latents, timesteps, prompt_embeds)
            loss, implicit_acc = block(model_pred, ref_pred, target, beta_dpo)

            (loss / accumulation).backward()
            log["loss"].append(loss.detach())
            log["implicit_acc"].append(implicit_acc)
        log["grad_norm"].append(nn.utils.clip_grad_norm_(unet.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        if update % 3 == 2:
            ref_unet.load_state_dict(unet.state_dict())
    log["weights"] = [parameter.detach() for parameter in unet.parameters()]
    return log


@pytest.mark.parametrize(("before", "after"), [(dpo_before, dpo_after), (seppo_before, seppo_after)])
def test_exchanging_the_block_changes_nothing(before: Block, after: Block) -> None:
    old, new = train(before), train(after)
    assert len(old["loss"]) == len(new["loss"]) == 16
    torch.testing.assert_close(new["loss"], old["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new["grad_norm"], old["grad_norm"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(new["weights"], old["weights"], rtol=1e-4, atol=1e-5)
    assert [x.item() for x in new["implicit_acc"]] == [x.item() for x in old["implicit_acc"]]


def test_the_two_objectives_part_ways() -> None:
    # Otherwise the test above would pass even if the two losses were swapped.
    dpo, seppo = train(dpo_before), train(seppo_before)
    assert dpo["loss"][:2] == seppo["loss"][:2]  # every pair of the first update ties
    assert max(abs(first - second) for first, second in zip(dpo["loss"], seppo["loss"])) > 0.05
