"""The baseline of all speed: SePPO as one writes it into the Diffusion-DPO training script.

Two UNets are resident and the local batch is one pair. For each pair the winner's picture and its prompt are encoded
online, the reference's sample comes from one call of the diffusers pipeline, policy and reference make a forward each,
the loss is that of the paper's appendix B.2 as written there, and AdamW steps once the pairs of an update are
accumulated. As in that script, the reference is kept in the compute dtype and the policy runs under autocast.

Two things are cheaper here than in the script, so no part of what is measured is bought by them: the sample stays in
latent space (no VAE decode and encode), and noises and timesteps are given. The winner's latent is the mode of the
VAE's posterior, as in the cache that it is compared with; the script draws from it.

Clips go the same way, through diffusers' AnimateDiff pipeline: a latent is then `(C, F, H, W)`, F frames.

Shape legend: one pair, C channels, H x W latent size, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from benchmarks.measure import Machine, Stopwatch
from benchmarks.models import load_pipeline, load_pixels
from benchmarks.rows import ENCODING, GENERATION, OPTIMIZER, POLICY, REFERENCE
from seppo_fast.config import Config
from seppo_fast.data.examples import Example
from seppo_fast.pairs import Pairs
from seppo_fast.policy import DTYPES, make_trainable, trainable


class NaiveLoop:
    """Trains one pair at a time.

    Args:
        config: what the library would train from; batches and whatever else is ours is not read.
        machine: where.

    Attributes:
        unet: the policy.
        pipe: the reference, with its own UNet, VAE and text encoder.
    """

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config = config
        self.machine = machine
        self.dtype = DTYPES[config.model.precision]
        self.unet = load_pipeline(config.model, torch.float32, machine.device).unet
        make_trainable(self.unet, config.model, config.seed)
        self.pipe = load_pipeline(config.model, self.dtype, machine.device)
        self._clip = {"num_frames": config.data.frames} if config.model.motion_adapter else {}
        self.pipe.unet.requires_grad_(False)
        self.schedule = DDPMScheduler.from_config(self.pipe.scheduler.config)
        if config.sampler.name == "dpmsolver++":
            solver = DPMSolverMultistepScheduler.from_config(self.pipe.scheduler.config, algorithm_type="dpmsolver++")
            self.pipe.scheduler = solver
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained weights."""
        return list(trainable(self.unet).values())

    def update(self, examples: Sequence[Example], start_noise: Tensor, pairs: Pairs) -> Stopwatch:
        """One optimizer update.

        Args:
            examples: prompt and winner of each sample.
            start_noise: `(samples, C, H, W)`, x_T of each sample.
            pairs: their timesteps and noises, `reference.uses` in a row for each sample; nothing else of them is read.

        Returns:
            Seconds by phase.
        """
        watch, uses = Stopwatch(self.machine), self.config.reference.uses
        for row in range(len(pairs)):
            if row % uses == 0:
                example = examples[row // uses]
                with watch.phase(GENERATION):
                    loser = self.sample(example.prompt, start_noise[row // uses])
                with watch.phase(ENCODING):
                    winner, embeds = self.encode_image(example), self.encode_prompt(example.prompt)
            loss = self.loss(winner, loser, embeds, pairs.noise[row], pairs.timesteps[row], watch)
            with watch.phase(POLICY):
                (loss / len(pairs)).backward()
        self.step(watch)
        return watch

    @torch.no_grad()
    def sample(self, prompt: str, noise: Tensor) -> Tensor:
        """The reference's sample `(1, C, H, W)`: a call of the pipeline, which encodes the prompt itself."""
        sampler = self.config.sampler
        return self.pipe(
            prompt,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            latents=noise[None].to(self.machine.device, self.dtype),
            output_type="latent",
            return_dict=False,
            **self._clip,
        )[0]

    @torch.no_grad()
    def encode_image(self, example: Example) -> Tensor:
        """The winner's latent `(1, C, H, W)`."""
        pixels = torch.tensor(load_pixels(example, self.config))
        frames = pixels.reshape(-1, *pixels.shape[-3:])  # of a picture: itself
        frames = frames.to(self.machine.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.pipe.vae.encode(frames.to(self.dtype)).latent_dist.mode() * self.pipe.vae.config.scaling_factor
        return latents.transpose(0, 1)[None] if self._clip else latents

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """The prompt's embedding `(1, L, D)`."""
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            prompt, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return self.pipe.text_encoder(tokens.input_ids.to(self.machine.device))[0]

    def loss(
        self, winner: Tensor, loser: Tensor, embeds: Tensor, noise: Tensor, timestep: Tensor, watch: Stopwatch
    ) -> Tensor:
        """Appendix B.2's loss of one pair; winner and loser `(1, C, H, W)`, noise `(C, H, W)`, timestep `()`."""
        device = self.machine.device
        latents = torch.cat([winner, loser])
        noise = noise.to(device, latents.dtype).expand_as(latents)
        timesteps = timestep.to(device).expand(2)
        noised = self.schedule.add_noise(latents, noise, timesteps)
        embeds = embeds.expand(2 * self._clip.get("num_frames", 1), -1, -1)  # the UNet of clips wants one a frame
        target = noise
        if self.schedule.config.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(latents, noise, timesteps)
        with watch.phase(REFERENCE), torch.no_grad():
            ref_pred = self.pipe.unet(noised, timesteps, embeds, return_dict=False)[0]
        with watch.phase(POLICY):
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                model_pred = self.unet(noised, timesteps, embeds, return_dict=False)[0]
            return self.preference(model_pred, ref_pred, target)

    def preference(self, model_pred: Tensor, ref_pred: Tensor, target: Tensor) -> Tensor:
        """Appendix B.2 of the paper: predictions and target `(2, C, H, W)`, winner first."""
        latent = list(range(1, target.dim()))
        model_error = (model_pred.float() - target.float()).pow(2).mean(dim=latent)
        ref_error = (ref_pred.float() - target.float()).pow(2).mean(dim=latent)
        winner_gap, loser_gap = (model_error - ref_error).chunk(2)
        sign = torch.where(winner_gap > 0, 1.0, -1.0)
        return -F.logsigmoid(-0.5 * self.config.train.beta * (winner_gap + sign * loser_gap)).mean()

    def step(self, watch: Stopwatch) -> Tensor:
        """Clip, AdamW, zero; returns the norm of the gradient before clipping."""
        with watch.phase(POLICY):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.train.max_grad_norm)
        with watch.phase(OPTIMIZER):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm
