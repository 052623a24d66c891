"""Makes the shipped motion adapter: `python -m benchmarks.shapes_world.pretrain_motion --output DIR`.

Trains a tiny MotionAdapter in the diffusers format, and the pipeline that it belongs to, starting from the shipped
pipeline. That pipeline is not enough as it is: at the high noise levels where a motion is decided, the noise that it
predicts says nearly nothing about the picture, and it has never seen a word for a motion. So the new pipeline predicts
v, which at high noise is the picture itself (Salimans and Ho 2022).

The pipeline is trained twice. First on stills, alone: it learns from the word for a motion where the object is at the
end of its path, and how large it is there. Then on clips, together with the adapter, which learns when. With clips
alone it only learns that an object which "moves left" is left or right of the middle: among the word, the frame's
position in time and the object's place, no two tell anything about each other, only all three together do. As with the
shipped pipeline, the captions are deliberately noisy: some name another motion, so that there is something left to
align. All training uses the linear schedule, as AnimateDiff's does. Everything is determined by `Settings.seed` (up to
the machine's rounding).
"""

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.shapes_world.pretrain import (
    TIMESTEPS,
    Report,
    _batches,
    _count,
    _tokenize,
    _update,
    _warm_cosine,
    encode,
)
from seppo_fast.shapes import PIPELINE, pipeline_folder
from seppo_fast.shapes.motion import FRAMES, MOTIONS, all_captions, caption, moving_scene, noisy_caption, render
from seppo_fast.shapes.motion_judge import judge_all
from seppo_fast.shapes.world import SIZE

SCHEDULE: dict[str, Any] = {  # AnimateDiff's, except for the prediction type
    "num_train_timesteps": TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "clip_sample": False,
    "timestep_spacing": "linspace",
    "prediction_type": "v_prediction",
}
ADAPTER, BASE = "motion_adapter", "motion_pipeline"
HEADS = 4
MAX_FRAMES = 32


@dataclass(frozen=True)
class Settings:
    """Everything that the shipped adapter depends on, besides the shipped pipeline.

    Attributes:
        output: Where to write the folders `motion_adapter` and `motion_pipeline`.
        clips: Number of scenes to train on; clip i is `moving_scene(seed, i)`.
        wrong: Share of captions that name another motion.
        stills: Updates on single frames from the second half of a clip.
        steps: Updates on clips.
        batch: Clips per update; an update on stills has as many stills as these clips have frames.
        lr: Peak learning rate.
        gently: Factor on the pipeline's learning rate while the adapter is trained; at 1 it would forget the words.
        ema: Decay of the moving average of the weights, which is what is saved.
        dropout: Share of prompts that are replaced by the empty prompt.
        judged: Number of captions that the result is judged on, at most 288, each with its own noise.
        sampler_steps: DDIM steps of the judged samples.
        seed: Seed of the scenes, captions, weights, order and noise.
    """

    output: Path
    clips: int = 2500
    wrong: float = 0.2
    stills: int = 1000
    steps: int = 2400
    batch: int = 8
    lr: float = 1e-3
    gently: float = 0.1
    ema: float = 0.995
    dropout: float = 0.1
    judged: int = 96
    sampler_steps: int = 10
    seed: int = 0


def pretrain(settings: Settings) -> Report:
    """Trains adapter and pipeline, writes them with their cards to `settings.output`, and returns the printed lines."""
    report = Report()
    torch.manual_seed(settings.seed)
    base = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None, local_files_only=True)
    scenes = [moving_scene(settings.seed, index) for index in range(settings.clips)]
    captions = [noisy_caption(one, settings.seed, index, settings.wrong) for index, one in enumerate(scenes)]
    latents = encode_clips(base.vae, np.stack([render(one) for one in scenes]))
    report(f"{len(scenes)} clips of {FRAMES} frames, {len(set(captions))} different captions")

    data = Data(latents, _tokenize(base.tokenizer, captions), _tokenize(base.tokenizer, [""]))
    train(settings, "stills", base.unet, base.text_encoder, data, report)
    adapter = make_adapter(base.unet)
    unet = UNetMotionModel.from_unet2d(base.unet, adapter)
    report(f"parameters of the adapter: {_count(adapter)}")
    train(settings, "clips", unet, base.text_encoder, data, report)
    base.unet.load_state_dict({name: unet.get_parameter(name) for name, _ in base.unet.named_parameters()})
    save(settings.output, base, unet)
    pipeline = AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        motion_adapter=None,
        scheduler=DDIMScheduler(**SCHEDULE, steps_offset=1),
    )
    report_round_trip(settings, base.vae, report)
    for guidance in (1.0, 1.5, 2.0, 3.0, 5.0):
        report_scores(settings, pipeline, guidance, report)
    write_cards(settings, report.lines)
    return report


def save(folder: Path, base: StableDiffusionPipeline, unet: UNetMotionModel) -> None:
    """Writes the adapter and the further trained pipeline, whose untrained parts are copied unchanged."""
    unet.save_motion_modules(folder / ADAPTER)
    pipeline_folder(folder / BASE)
    base.unet.save_pretrained(folder / BASE / "unet")
    # The config that was just written contains the local path that the UNet was loaded from.
    shutil.copyfile(PIPELINE / "unet" / "config.json", folder / BASE / "unet" / "config.json")
    base.text_encoder.save_pretrained(folder / BASE / "text_encoder")
    base.scheduler.register_to_config(prediction_type=SCHEDULE["prediction_type"])
    base.scheduler.save_pretrained(folder / BASE / "scheduler")


def make_adapter(unet: UNet2DConditionModel) -> MotionAdapter:
    """Returns a new adapter with a motion module after every resnet of `unet`; initially it changes nothing."""
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=unet.config.layers_per_block,
        motion_num_attention_heads=HEADS,
        motion_norm_num_groups=unet.config.norm_num_groups,
        motion_max_seq_length=MAX_FRAMES,
        use_motion_mid_block=True,
    )
    for name, parameter in adapter.named_parameters():
        if ".proj_out." in name:
            nn.init.zeros_(parameter)
    return adapter


@dataclass(frozen=True)
class Data:
    """Training data.

    Attributes:
        latents: Latents of n clips, float32 (n, 4, F, 8, 8).
        ids: Token ids of their captions (n, 16).
        empty: Token ids of the empty caption (1, 16).
    """

    latents: Tensor
    ids: Tensor
    empty: Tensor


def train(settings: Settings, what: str, unet: nn.Module, text_encoder: nn.Module, data: Data, report: Report) -> None:
    """Trains UNet and text encoder to predict v of "clips" or "stills"; they end with the averaged weights."""
    modules = nn.ModuleList([unet.train(), text_encoder.train()])
    trained = list(modules.parameters())
    clips = what == "clips"
    steps, batch = (settings.steps, settings.batch) if clips else (settings.stills, settings.batch * FRAMES)
    noising = DDPMScheduler(**SCHEDULE)
    adapter = {id(parameter) for name, parameter in unet.named_parameters() if "motion_modules" in name}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) in adapter]},
        {"params": [p for p in trained if id(p) not in adapter], "share": settings.gently if clips else 1},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, weight_decay=0.01)
    average = [parameter.detach().clone() for parameter in trained]
    losses = []
    for step, rows in enumerate(_batches(len(data.latents), batch, steps, settings.seed + 1)):
        drop = torch.rand(batch, 1) < settings.dropout
        embeds = text_encoder(torch.where(drop, data.empty, data.ids[rows]))[0]
        if clips:
            latents, embeds = data.latents[rows], embeds.repeat_interleave(FRAMES, dim=0)
        else:
            latents = data.latents[rows, :, torch.randint(FRAMES // 2, FRAMES, (batch,))]
        noise = torch.randn_like(latents)
        # Favours high noise, where places, sizes and motions are decided.
        timesteps = (TIMESTEPS * torch.rand(batch).sqrt()).long()
        predicted = unet(noising.add_noise(latents, noise, timesteps), timesteps, embeds).sample
        loss = F.mse_loss(predicted, noising.get_velocity(latents, noise, timesteps))
        _update(loss, optimizer, settings.lr * _warm_cosine(step, steps))
        # The average forgets the first steps faster than `ema` would.
        decay = min(settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            report(f"{what} {step + 1}/{steps}  loss {np.mean(losses):.4f}")
            losses = []
    with torch.no_grad():
        for parameter, value in zip(trained, average, strict=True):
            parameter.copy_(value)
    modules.eval()


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, clips: NDArray[np.uint8]) -> Tensor:
    """Returns the scaled latent means of n clips (n, F, SIZE, SIZE, 3), float32 (n, 4, F, 8, 8)."""
    latents = encode(vae, clips.reshape(-1, SIZE, SIZE, 3)) * vae.config.scaling_factor
    return latents.unflatten(0, clips.shape[:2]).transpose(1, 2).contiguous()


@torch.no_grad()
def decode_clips(vae: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """Returns clips (n, F, SIZE, SIZE, 3) from scaled latents (n, 4, F, 8, 8)."""
    parts = (latents.transpose(1, 2).flatten(0, 1) / vae.config.scaling_factor).split(256)
    images = torch.cat([vae.decode(part).sample.add(1).mul(127.5).round().clamp(0, 255) for part in parts])
    clips = images.to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, (len(latents), -1))
    return clips.numpy()


def report_round_trip(settings: Settings, vae: AutoencoderKL, report: Report) -> None:
    """Reports the judge's verdict on unseen clips after encoding and decoding, an upper bound for any sample."""
    scenes = [moving_scene(settings.seed + 1, index) for index in range(settings.judged)]
    rebuilt = decode_clips(vae, encode_clips(vae, np.stack([render(one) for one in scenes])))
    summary = _summary(judge_all([caption(one) for one in scenes], rebuilt))
    report(f"VAE round trip of {len(scenes)} unseen clips: {summary}")


def report_scores(settings: Settings, pipeline: AnimateDiffPipeline, guidance: float, report: Report) -> None:
    """Reports the judge's verdict on samples for the world's captions (DDIM, generator seed = `settings.seed`)."""
    pipeline.set_progress_bar_config(disable=True)
    texts = all_captions()
    rng = np.random.default_rng(settings.seed)
    prompts = [texts[number] for number in rng.permutation(len(texts))[: settings.judged]]
    generator = torch.Generator().manual_seed(settings.seed)
    clips = []
    for start in range(0, len(prompts), 16):
        frames = pipeline(
            prompts[start : start + 16],
            num_frames=FRAMES,
            height=SIZE,
            width=SIZE,
            num_inference_steps=settings.sampler_steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).frames
        clips.append(np.rint(frames * 255).astype(np.uint8))
    summary = _summary(judge_all(prompts, np.concatenate(clips)))
    report(f"judge, {len(prompts)} captions, DDIM {settings.sampler_steps} steps, guidance {guidance:g}: {summary}")


def write_cards(settings: Settings, lines: list[str]) -> None:
    """Writes the model cards: a description, the command, and the `lines` that it printed."""
    options = [
        f"--{field.name.replace('_', '-')} {getattr(settings, field.name)}"
        for field in fields(settings)
        if field.name != "output" and getattr(settings, field.name) != field.default
    ]
    command = " ".join(["python -m benchmarks.shapes_world.pretrain_motion --output DIR", *options])
    printed = "\n".join(lines)
    text = f"""# A tiny motion adapter for the world of shapes

Clips of {FRAMES} frames of {SIZE}x{SIZE} pixels in which one coloured shape {", ".join(MOTIONS[:-1])} or {MOTIONS[-1]}.
Trained on captions of which {settings.wrong:.0%} name another motion. It exists to be aligned, and knows nothing else.
It goes with the pipeline in `../{BASE}`, predicts v, and needs AnimateDiff's linear schedule:

```python
folder = seppo_fast.shapes.pipeline_folder("pipeline", "shapes-motion")
adapter = MotionAdapter.from_pretrained(seppo_fast.shapes.MOTION_ADAPTER)
scheduler = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="linear",
    steps_offset=1,
    clip_sample=False,
    timestep_spacing="linspace",
    prediction_type="v_prediction",
)
pipeline = AnimateDiffPipeline.from_pretrained(folder, motion_adapter=adapter, scheduler=scheduler)
```

Made on {torch.get_num_threads()} CPU thread(s), with torch {torch.__version__}, by

```
{command}
```

which printed (seed {settings.seed}; the judged samples' noise is new, their captions are among the world's 288, most of
which training has seen; a clip of the right thing with another motion scores 0.67 or 0.75)

```
{printed}
```
"""
    (settings.output / ADAPTER / "README.md").write_text(text, encoding="utf-8")
    base = f"""# The small Stable Diffusion that the motion adapter goes with

The pipeline in `../pipeline`, trained further with the motion adapter in `../{ADAPTER}`, whose card says how.
It predicts v, as its scheduler says. Autoencoder and tokenizer are the same files.
"""
    (settings.output / BASE / "README.md").write_text(base, encoding="utf-8")


def _summary(entries: list[dict[str, bool]]) -> str:
    """Formats the mean share of right attributes, and the shares of clips with all right and with the right motion."""
    values = [list(entry.values()) for entry in entries]
    shares = np.array([np.mean(value) for value in values])
    motion = np.mean([value[-1] for value in values])
    return f"attributes {shares.mean():.4f}, all right {np.mean(shares == 1):.4f}, motion {motion:.4f}"


def main() -> None:
    import tyro

    pretrain(tyro.cli(Settings))


if __name__ == "__main__":
    main()
