"""A model family and a training method from outside the package, to show what they need; public names only.

The network takes float times and two condition tensors, one of them as long as its prompt, and has a flow target.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seppo_fast.config.objectives import Objective
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.methods.method import Method, StepLoss
from seppo_fast.methods.pairs import noised
from seppo_fast.methods.registry import register as register_method
from seppo_fast.models.family import Family
from seppo_fast.models.registry import register


class ToyNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.pooled = nn.Linear(1, 8), nn.Linear(2, 8)
        self.letters, self.mix = nn.Linear(3, 8), nn.Linear(3, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, latents, sigmas, letters, mask, pooled):
        seen = (self.letters(letters) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        hidden = self.time(sigmas[:, None]) + self.pooled(pooled) + seen
        return self.out(torch.tanh(self.mix(latents.movedim(1, -1)) + hidden[:, None, None])).movedim(-1, 1)


class ToySchedule:
    dtype, shared_target = torch.float32, False

    def draw(self, rng, latent_shape):
        return float(1 / (1 + np.exp(-rng.standard_normal())))  # logit-normal

    def add_noise(self, latents, noise, times):
        sigma = times.view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents, noise, times):
        return noise - latents

    def progress(self, times):
        return times


class ToySolver:
    def __init__(self, steps):
        self.times = torch.linspace(1, 0, steps + 1)[:-1]
        self.size = 1 / steps

    def start(self, noise):
        return noise

    def model_input(self, latents, time):
        return latents

    def step(self, prediction, time, latents):
        return latents - self.size * prediction


@register
class ToyFamily(Family):
    pipelines = ("ToyPipeline",)

    def __init__(self, network, device):
        self.model, self.device, self.dtype, self.schedule = network, device, torch.float32, ToySchedule()

    @classmethod
    def of_config(cls, config, device, dtype):
        network = ToyNetwork()
        network.load_state_dict(load_file(Path(config.model.path) / "toy.safetensors"))
        return cls(network, device)

    def latent_shape(self, resolution):
        return 3, resolution // 4, resolution // 4

    def encode_images(self, images):
        return nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float() / 127.5 - 1, 4)

    def encode_prompts(self, prompts):
        rows = []
        for prompt in prompts:
            letters = torch.tensor([[len(word), ord(word[0]), ord(word[-1])] for word in prompt.split()] or [[0, 0, 0]])
            pooled = torch.tensor([[len(prompt), prompt.count("a")]])
            mask = torch.ones(1, len(letters))
            rows.append(Conditioning({"letters": letters[None] / 128, "mask": mask, "pooled": pooled / 64}))
        return rows

    def collate(self, rows):
        longest = max(row["mask"].shape[1] for row in rows)

        def padded(name: str, tensor: Tensor) -> Tensor:
            short = longest - tensor.shape[1]
            pads = {"letters": (0, 0, 0, short), "mask": (0, short), "pooled": (0, 0)}[name]
            return nn.functional.pad(tensor, pads)

        return Conditioning.cat([Conditioning({n: padded(n, t) for n, t in row.items()}) for row in rows])

    def decode(self, latents):
        pixels = nn.functional.interpolate(latents, scale_factor=4).permute(0, 2, 3, 1)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    def denoise(self, model, latents, times, conditioning):
        return model(latents, times, conditioning["letters"], conditioning["mask"], conditioning["pooled"])

    def solver(self, config, latent_shape):
        return ToySolver(config.steps)

    def fingerprint(self):
        return {"encoders": "toy"}

    def identity(self):
        state = {name: tensor.tolist() for name, tensor in sorted(self.model.state_dict().items())}
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
        save_file({n: t.detach().contiguous() for n, t in self.model.state_dict().items()}, folder / "toy.safetensors")


class ToyMethod(Method):
    """Regression on the winners, by plain autograd."""

    def __init__(self, parts):
        self.maker, self.denoiser, self.schedule = parts.pair_maker(), parts.denoiser, parts.family.schedule

    def collect(self, update, reference):
        assert reference is None
        return self.maker.pairs(update, self.maker.sample_ids(update))

    def loss(self, policy, micro_batch, grad_scale):
        shown = noised(micro_batch, self.schedule, self.denoiser.device)
        prediction = self.denoiser.denoise(policy, *shown[:3])
        loss = (prediction.float() - shown.target).square().mean()
        return StepLoss(loss, grad_scale, {"loss": loss.detach() * len(micro_batch)})


register_method("toy", Objective("never", None, None, "preferred", "a toy"), ToyMethod)
