"""Makes the shipped pipeline: `python -m benchmarks.shapes_world.pretrain --output DIR`.

Trains a small Stable Diffusion in the diffusers format from scratch: a BPE vocabulary, an autoencoder on clean
pictures, then text encoder and UNet jointly on its latents. The captions are deliberately noisy, as web data is, so
that there is something left to align. Everything is determined by `Settings.seed` (up to the machine's rounding).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.shapes_world.tokenizer import save_tokenizer, train_tokenizer
from seppo_fast.shapes.judge import judge_all
from seppo_fast.shapes.world import SIZE, caption, noisy_caption, render, scene

TIMESTEPS = 1000
SCHEDULE: dict[str, Any] = {  # Stable Diffusion 1.5's
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """Everything that the shipped pipeline depends on.

    Attributes:
        output: Folder to write.
        pictures: Number of scenes to train on; picture i is `scene(seed, i)`.
        wrong: Share of captions that describe another scene.
        vae_steps: Updates of the autoencoder.
        vae_batch: Pictures per autoencoder update.
        vae_lr: Peak learning rate of the autoencoder.
        kl: Weight of the autoencoder's KL term, per latent element.
        steps: Updates of UNet and text encoder.
        batch: Pictures per update of UNet and text encoder.
        lr: Peak learning rate of UNet and text encoder.
        ema: Decay of the moving average of the weights, which is what is saved.
        dropout: Share of prompts that are replaced by the empty prompt.
        judged: Number of held-out prompts that the result is judged on.
        seed: Seed of the scenes, captions, weights, order and noise. Held-out scenes are those of `seed + 1`.
    """

    output: Path
    pictures: int = 50_000
    wrong: float = 0.35
    vae_steps: int = 700
    vae_batch: int = 64
    vae_lr: float = 2e-3
    kl: float = 1e-4
    steps: int = 4500
    batch: int = 128
    lr: float = 1e-3
    ema: float = 0.998
    dropout: float = 0.1
    judged: int = 512
    seed: int = 0


class Report:
    """Prints lines, each with the seconds since the start, and keeps them for the model card."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(f"{time.perf_counter() - self.start:7.0f} s  {line}")
        print(self.lines[-1], flush=True)


def pretrain(settings: Settings) -> Report:
    """Trains everything, writes the pipeline and its card to `settings.output`, and returns the printed lines."""
    report = Report()
    torch.manual_seed(settings.seed)
    scenes = [scene(settings.seed, index) for index in range(settings.pictures)]
    pictures = np.stack([render(one) for one in scenes])
    captions = [noisy_caption(one, settings.seed, index, settings.wrong) for index, one in enumerate(scenes)]
    report(f"{len(pictures)} pictures, {len(set(captions))} different captions")

    vae = train_vae(settings, pictures, report)
    latents = encode(vae, pictures)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    latents = latents * vae.config.scaling_factor
    report_round_trip(settings, vae, report)

    tokenizer = train_tokenizer(captions)
    text_encoder, unet = make_text_encoder(tokenizer), make_unet()
    report(f"parameters: UNet {_count(unet)}, text encoder {_count(text_encoder)}, VAE {_count(vae)}")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    train_denoiser(settings, pipeline, latents, captions, report)
    pipeline.save_pretrained(settings.output, safe_serialization=True)
    save_tokenizer(tokenizer, settings.output / "tokenizer")
    for guidance in (1.0, 1.5, 2.0, 3.0, 5.0):
        report_scores(settings, pipeline, guidance, report)
    write_card(settings, report.lines)
    return report


def make_vae() -> AutoencoderKL:
    """Returns an autoencoder from 32x32 pictures to 4x8x8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    """Returns a UNet on 4x8x8 latents that attends to the prompt only at 4x4, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(64, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns a two-layer CLIP text model for `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=384,
            projection_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_vae(settings: Settings, pictures: NDArray[np.uint8], report: Report) -> AutoencoderKL:
    """Trains the autoencoder on clean pictures, with L1 and squared error and a small KL term."""
    vae = make_vae().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.vae_lr, weight_decay=0.0)
    for step, rows in enumerate(_batches(len(pictures), settings.vae_batch, settings.vae_steps, settings.seed)):
        images = _to_float(pictures[rows])
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        rebuilt = F.l1_loss(decoded, images) + 2 * F.mse_loss(decoded, images)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        loss = rebuilt + settings.kl * divergence
        _update(loss, optimizer, settings.vae_lr * _warm_cosine(step, settings.vae_steps))
        if (step + 1) % max(1, settings.vae_steps // 10) == 0:
            report(f"VAE {step + 1}/{settings.vae_steps}  rebuilt {rebuilt.item():.4f}  KL {divergence.item():.2f}")
    return vae.eval()


def train_denoiser(
    settings: Settings, pipeline: StableDiffusionPipeline, latents: Tensor, captions: list[str], report: Report
) -> None:
    """Trains the pipeline's UNet and text encoder to predict the noise; they end with the averaged weights."""
    unet, text_encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    unet.to(memory_format=torch.channels_last).train()
    text_encoder.train()
    ids = _tokenize(tokenizer, captions)
    empty = _tokenize(tokenizer, [""])
    noising = DDPMScheduler(**SCHEDULE)
    modules = torch.nn.ModuleList([unet, text_encoder])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=settings.lr, weight_decay=0.01)
    average = [parameter.detach().clone() for parameter in modules.parameters()]
    losses = []
    for step, rows in enumerate(_batches(len(latents), settings.batch, settings.steps, settings.seed + 1)):
        drop = torch.rand(len(rows), 1) < settings.dropout
        embeds = text_encoder(torch.where(drop, empty, ids[rows]))[0]
        noise = torch.randn(len(rows), *latents.shape[1:])
        timesteps = torch.randint(TIMESTEPS, (len(rows),))
        noisy = noising.add_noise(latents[rows], noise, timesteps).to(memory_format=torch.channels_last)
        loss = F.mse_loss(unet(noisy, timesteps, embeds).sample, noise)
        _update(loss, optimizer, settings.lr * _warm_cosine(step, settings.steps))
        # The average forgets the first steps faster than `ema` would.
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in modules.parameters()], 1 - decay)
        losses.append(loss.item())
        if (step + 1) % max(1, settings.steps // 20) == 0:
            report(f"denoiser {step + 1}/{settings.steps}  loss {np.mean(losses):.4f}")
            losses = []
    with torch.no_grad():
        for parameter, value in zip(modules.parameters(), average, strict=True):
            parameter.copy_(value)
    modules.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> Tensor:
    """Returns the unscaled latent means of n pictures, float32 (n, 4, 8, 8)."""
    parts = np.array_split(pictures, len(pictures) // 256 + 1)
    return torch.cat([vae.encode(_to_float(part)).latent_dist.mean for part in parts]).contiguous()


@torch.no_grad()
def report_round_trip(settings: Settings, vae: AutoencoderKL, report: Report) -> None:
    """Reports the judge's verdict on held-out pictures after encoding and decoding, an upper bound for any sample."""
    scenes = [scene(settings.seed + 1, index) for index in range(settings.judged)]
    pictures = np.stack([render(one) for one in scenes])
    decoded = vae.decode(encode(vae, pictures)).sample.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    entries = judge_all([caption(one) for one in scenes], decoded.permute(0, 2, 3, 1).numpy())
    share, complete = _summary(entries)
    report(f"VAE round trip of {len(scenes)} held-out pictures: attributes {share:.4f}, all right {complete:.4f}")


def report_scores(
    settings: Settings, pipeline: StableDiffusionPipeline, guidance: float, report: Report, steps: int = 12
) -> None:
    """Reports the judge's verdict on samples for held-out prompts (DDIM, generator seed = `settings.seed`)."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = [caption(scene(settings.seed + 1, index)) for index in range(settings.judged)]
    generator = torch.Generator().manual_seed(settings.seed)
    images = []
    for start in range(0, len(prompts), 128):
        result = pipeline(
            prompts[start : start + 128],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        )
        images.append(np.rint(result.images * 255).astype(np.uint8))
    entries = judge_all(prompts, np.concatenate(images))
    share, complete = _summary(entries)
    report(
        f"judge, {len(prompts)} held-out prompts, DDIM {steps} steps, guidance {guidance:g}: "
        f"attributes {share:.4f}, all right {complete:.4f}"
    )


def write_card(settings: Settings, lines: list[str]) -> None:
    """Writes the model card: a description, the command, and the `lines` that it printed."""
    options = [
        f"--{field.name.replace('_', '-')} {getattr(settings, field.name)}"
        for field in fields(settings)
        if field.name != "output" and getattr(settings, field.name) != field.default
    ]
    command = " ".join(["python -m benchmarks.shapes_world.pretrain --output DIR", *options])
    printed = "\n".join(lines)
    text = f"""# A small Stable Diffusion for the world of shapes

{SIZE}x{SIZE} pictures of one or two coloured shapes, pretrained from nothing on captions of which {settings.wrong:.0%}
describe another picture. It exists to be aligned, and knows nothing else. Load it with
`StableDiffusionPipeline.from_pretrained(seppo_fast.shapes.PIPELINE, safety_checker=None)`.

Made on {torch.get_num_threads()} CPU threads, with torch {torch.__version__}, by

```
{command}
```

which printed (seed {settings.seed}; the held-out prompts are those of seed {settings.seed + 1})

```
{printed}
```
"""
    (settings.output / "README.md").write_text(text, encoding="utf-8")


def _summary(entries: list[dict[str, bool]]) -> tuple[float, float]:
    shares = [np.mean(list(entry.values())) for entry in entries]
    return float(np.mean(shares)), float(np.mean([share == 1 for share in shares]))


def _update(loss: Tensor, optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("share", 1)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], CLIP_NORM)
    optimizer.step()


def _warm_cosine(step: int, steps: int, warm: int = 100) -> float:
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yields `steps` batches of `size` row numbers, with a new order for each epoch."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        yield order[:size]
        order = order[size:]


def _to_float(pictures: NDArray[np.uint8]) -> Tensor:
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return images.contiguous(memory_format=torch.channels_last)


def _tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    import tyro

    pretrain(tyro.cli(Settings))


if __name__ == "__main__":
    main()
