"""The baseline for all speed comparisons: SePPO as one would write it into the Diffusion-DPO training script.

Two UNets are resident and the local batch is one pair. For each pair, the winner's picture and prompt are encoded
online, the reference's sample comes from one call of the diffusers pipeline, policy and reference run one forward each,
and the loss is written as in the paper's appendix B.2. AdamW steps once the pairs of an update are accumulated. As in
that script, the reference is kept in the compute dtype and the policy runs under autocast. With a larger local batch,
which the script leaves to its user, all of this is done for several pairs at once.

Two things are cheaper here than in the script, so they cannot exaggerate the measured speed-up: the sample stays in
latent space (no VAE decode and encode), and noises and timesteps are given. The winner's latent is the mode of the
VAE's posterior, as in the cache of the trainer that it is compared with; the script samples from the posterior.

Clips are handled alike, through diffusers' AnimateDiff pipeline; a latent is then `(C, F, H, W)` with F frames.

Shape legend: b pairs of a local batch, C channels, H x W latent size, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from benchmarks.harness.measure import Machine, Stopwatch
from benchmarks.harness.models import load_pipeline, load_pixels
from benchmarks.harness.rows import ENCODING, GENERATION, OPTIMIZER, POLICY, REFERENCE
from seppo_fast.config.schema import Config
from seppo_fast.data.examples import Example
from seppo_fast.methods.pairs import Pairs
from seppo_fast.models.trainable import DTYPES, make_trainable, trainable
from seppo_fast.models.unet import UNetFamily


class NaiveLoop:
    """A training loop that processes one local batch of pairs at a time.

    Args:
        config: the configuration that the library would train from; batch sizes and the library's own options are not
            used.
        machine: the machine that it runs on.

    Attributes:
        unet: the policy.
        pipe: the reference, with its own UNet, VAE and text encoder.
    """

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config = config
        self.machine = machine
        self.dtype = DTYPES[config.model.precision]
        self.unet = load_pipeline(config.model, torch.float32, machine.device).unet
        make_trainable(self.unet, config.model, config.seed, UNetFamily)
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
        """Returns the trained weights."""
        return list(trainable(self.unet).values())

    def update(self, examples: Sequence[Example], start_noise: Tensor, pairs: Pairs, batch: int = 1) -> Stopwatch:
        """Runs one optimizer update.

        Args:
            examples: prompt and winner of each sample.
            start_noise: `(samples, C, H, W)`, x_T of each sample.
            pairs: timesteps and noises, `reference.uses` consecutive rows per sample; nothing else of it is read.
            batch: pairs per forward; a call of the pipeline generates as many samples as they need.

        Returns:
            Seconds by phase.
        """
        watch, uses = Stopwatch(self.machine), self.config.reference.uses
        at_once = max(1, batch // uses)
        for first in range(0, len(examples), at_once):
            chosen = examples[first : first + at_once]
            prompts = [example.prompt for example in chosen]
            with watch.phase(GENERATION):
                losers = self.sample(prompts, start_noise[first : first + at_once])
            with watch.phase(ENCODING):
                winners, embeds = self.encode_images(chosen), self.encode_prompts(prompts)
            winners, losers, embeds = (made.repeat_interleave(uses, 0) for made in (winners, losers, embeds))
            for start in range(0, len(winners), batch):
                own = slice(start, start + batch)
                rows = slice(first * uses + start, min(first * uses + start + batch, (first + len(chosen)) * uses))
                noise, timesteps = pairs.noise[rows], pairs.times[rows]
                loss = self.loss(winners[own], losers[own], embeds[own], noise, timesteps, watch)
                with watch.phase(POLICY):
                    (loss * (len(noise) / len(pairs))).backward()
        self.step(watch)
        return watch

    @torch.no_grad()
    def sample(self, prompts: list[str], noise: Tensor) -> Tensor:
        """Returns the reference's samples `(b, C, H, W)` from one pipeline call, which also encodes the prompts."""
        sampler = self.config.sampler
        return self.pipe(
            prompts,
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            latents=noise.to(self.machine.device, self.dtype),
            output_type="latent",
            return_dict=False,
            **self._clip,
        )[0]

    @torch.no_grad()
    def encode_images(self, examples: Sequence[Example]) -> Tensor:
        """Returns the winners' latents `(b, C, H, W)`."""
        pixels = torch.from_numpy(np.stack([load_pixels(example, self.config) for example in examples]))
        frames = pixels.flatten(0, -4)  # changes nothing for pictures
        frames = frames.to(self.machine.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = self.pipe.vae.encode(frames.to(self.dtype)).latent_dist.mode() * self.pipe.vae.config.scaling_factor
        return latents.unflatten(0, (len(examples), -1)).transpose(1, 2) if self._clip else latents

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Returns the prompt embeddings `(b, L, D)`."""
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return self.pipe.text_encoder(tokens.input_ids.to(self.machine.device))[0]

    def loss(
        self, winners: Tensor, losers: Tensor, embeds: Tensor, noise: Tensor, timesteps: Tensor, watch: Stopwatch
    ) -> Tensor:
        """Returns the mean loss of b pairs; latents and noise `(b, C, H, W)`, embeds `(b, L, D)`, timesteps `(b,)`."""
        device = self.machine.device
        latents = torch.cat([winners, losers])
        noise = noise.to(device, latents.dtype).repeat(2, *[1] * (latents.dim() - 1))
        timesteps = timesteps.to(device).repeat(2)
        noised = self.schedule.add_noise(latents, noise, timesteps)
        embeds = embeds.repeat(2, 1, 1)
        if self._clip:  # AnimateDiff's UNet expects one embedding per frame
            embeds = embeds.repeat_interleave(self._clip["num_frames"], 0)
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
        """Returns the loss of the paper's appendix B.2; predictions and target `(2b, C, H, W)`, winners first."""
        latent = list(range(1, target.dim()))
        model_error = (model_pred.float() - target.float()).pow(2).mean(dim=latent)
        ref_error = (ref_pred.float() - target.float()).pow(2).mean(dim=latent)
        winner_gap, loser_gap = (model_error - ref_error).chunk(2)
        sign = torch.where(winner_gap > 0, 1.0, -1.0)
        return -F.logsigmoid(-0.5 * self.config.train.beta * (winner_gap + sign * loser_gap)).mean()

    def step(self, watch: Stopwatch) -> Tensor:
        """Clips, steps AdamW and clears the gradients; returns the gradient norm before clipping."""
        with watch.phase(POLICY):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.train.max_grad_norm)
        with watch.phase(OPTIMIZER):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norm
