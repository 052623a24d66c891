"""The AnimateDiff family: compared with diffusers' own pipeline, and the models and settings that it refuses."""

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from safetensors.torch import load_file, save_file
from torch import nn

from seppo_fast.config.load import parse_config
from seppo_fast.config.schema import ModelConfig, SamplerConfig
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.evaluation.generate import generate
from seppo_fast.evaluation.grids import side_by_side
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.families.animatediff import AnimateDiff
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.models.registry import validate_model
from seppo_fast.models.trainable import lora_weights, make_trainable, trainable
from seppo_fast.models.unet import UNetFamily
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.random import keyed_noise
from tests.helpers.calls import encoded
from tests.helpers.tiny import tiny_adapter, tiny_pipeline

CPU = torch.device("cpu")
FRAMES = 5
PROMPTS = ["a fox", "two foxes"]


def load(tiny, adapter, **settings):
    return AnimateDiff.load(str(tiny), CPU, motion_adapter=str(adapter), **{"frames": FRAMES} | settings)


@pytest.fixture(scope="module")
def family(tiny, adapter):
    return load(tiny, adapter)


def pipeline(tiny, adapter, **scheduler):
    """Returns diffusers' own pipeline, assembled as in its documentation."""
    pipe = AnimateDiffPipeline.from_pretrained(
        tiny,
        motion_adapter=MotionAdapter.from_pretrained(adapter),
        scheduler=DDIMScheduler.from_pretrained(
            tiny,
            subfolder="scheduler",
            **{"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "linspace", "steps_offset": 1}
            | scheduler,
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_for(prompts):
    return keyed_noise(3, "evaluation", [(0, row) for row in range(len(prompts))], (4, FRAMES, 8, 8))


def sampled(pipe, solver=None, **settings):
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "num_frames": FRAMES} | settings
    if solver is not None:
        pipe.scheduler = solver.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    return pipe(PROMPTS, height=16, width=16, latents=noise_for(PROMPTS), **{"output_type": "latent"} | settings).frames


def way_of(family, **settings):
    config = SamplerConfig(**{"steps": 4, "guidance": 3.0} | settings)
    return Denoiser(family, torch.float32), family.model, family.sampler(config, family.latent_shape(16))


def own_samples(family, **settings):
    denoiser, *way = way_of(family, **settings)
    return denoiser.sample(*way, noise_for(PROMPTS), encoded(family, PROMPTS), encoded(family, [""]))


def distance(samples, others):
    assert samples.shape == others.shape == (2, 4, FRAMES, 8, 8)
    return float((samples - others).abs().max())


# Values


@pytest.mark.parametrize(
    ("solver", "settings"), [(None, {"name": "ddim"}), (DPMSolverMultistepScheduler, {"name": "dpmsolver++"})]
)
def test_samples_equal_the_pipelines(tiny, adapter, family, solver, settings):
    ours, theirs = own_samples(family, **settings), sampled(pipeline(tiny, adapter), solver)
    assert distance(ours, theirs) < 1e-4
    other = sampled(pipeline(tiny, adapter, beta_schedule="scaled_linear"), solver)
    assert distance(ours, other) > 0.05  # another schedule gives visibly other samples


def test_clips_equal_the_pipelines(tiny, adapter, family):
    ours = generate(family, *way_of(family), PROMPTS, resolution=16, seed=3)
    theirs = sampled(pipeline(tiny, adapter), output_type="np")
    assert ours.shape == theirs.shape == (2, FRAMES, 16, 16, 3)
    assert np.abs(ours - 255 * theirs).max() <= 0.51
    assert np.abs(np.diff(theirs, axis=1)).max() > 0.1  # frames differ


def test_without_motion_each_frame_is_the_pictures_model(tiny, adapter):
    family, pictures = load(tiny, adapter), StableDiffusion.load(str(tiny), CPU)
    for name, weight in family.model.named_parameters():
        if "motion_modules" in name and "proj_out" in name:
            nn.init.zeros_(weight)
    latents, prompts = noise_for(PROMPTS), encoded(family, PROMPTS)
    timesteps = torch.tensor([3, 700])
    with torch.no_grad():
        clips = family.denoise(family.model, latents, timesteps, prompts)
        for frame in range(FRAMES):
            expected = pictures.denoise(pictures.model, latents[:, :, frame], timesteps, prompts)
            torch.testing.assert_close(clips[:, :, frame], expected, rtol=1e-4, atol=1e-5)


def test_the_schedule_is_the_linear_one(tiny, adapter, family):
    """Betas from 0.00085 to 0.012 in equal steps; the folder's own have equal steps of their square roots."""
    assert StableDiffusion.load(str(tiny), CPU).scheduler_config["beta_schedule"] == "scaled_linear"
    alpha = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))
    x, noise = torch.randn(2, 3, 4, FRAMES, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    timesteps = torch.tensor([0, 500, 999])
    share = torch.from_numpy(alpha[timesteps.numpy()]).view(3, 1, 1, 1, 1)
    expected = share.sqrt() * x.double() + (1 - share).sqrt() * noise.double()
    noised = NoiseSchedule(family.scheduler_config).add_noise(x, noise, timesteps)
    torch.testing.assert_close(noised.double(), expected, rtol=0, atol=1e-5)
    other = NoiseSchedule(load(tiny, adapter, beta_schedule="scaled_linear").scheduler_config)
    assert (other.add_noise(x, noise, timesteps) - noised).abs().max() > 0.1
    kept = {"steps_offset": 1, "clip_sample": False, "timestep_spacing": "linspace", "set_alpha_to_one": False}
    assert kept.items() <= family.scheduler_config.items()


def test_a_schedule_can_be_set_for_pictures_too(tiny):
    config = StableDiffusion.load(str(tiny), CPU, beta_schedule="linear").scheduler_config
    assert config["beta_schedule"] == "linear" and config["steps_offset"] == 1


@pytest.mark.parametrize("clips", [1, 2])
def test_clips_are_encoded_and_decoded_frame_by_frame(tiny, family, clips):
    pictures = StableDiffusion.load(str(tiny), CPU)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (clips, FRAMES, 16, 16, 3), dtype=np.uint8))
    latents = family.encode_images(pixels)
    assert latents.shape[1:] == family.latent_shape(16) == (4, FRAMES, 8, 8)
    decoded = family.decode(latents)
    assert decoded.shape == pixels.shape and decoded.dtype == np.uint8
    for clip in range(clips):
        torch.testing.assert_close(latents[clip].transpose(0, 1), pictures.encode_images(pixels[clip]))
        assert np.abs(decoded[clip].astype(int) - pictures.decode(latents[clip].transpose(0, 1))).max() <= 1


def test_the_vae_takes_a_megapixel_at_a_time(family, monkeypatch):
    seen = []

    def encode(pixels):
        seen.append(len(pixels))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels[:, :, :1, :1]))

    monkeypatch.setattr(family.pipe.vae, "encode", encode)
    assert family.encode_images(torch.zeros(1, 3, 1024, 512, 3, dtype=torch.uint8)).shape == (1, 3, 3, 1, 1)
    assert seen == [2, 1]


def test_a_cache_is_that_of_the_base(tiny, family):
    assert family.fingerprint() == StableDiffusion.load(str(tiny), CPU).fingerprint()


# Saved models and LoRAs


@pytest.mark.parametrize("where", ["spatial", "motion", "both"])
def test_a_lora_in_the_pipeline_gives_the_runs_own_samples(tiny, adapter, tmp_path, where):
    family = load(tiny, adapter)
    plain = own_samples(family)
    make_trainable(family.model, ModelConfig(precision="fp32", lora_rank=3, lora_on=where), seed=0, family=UNetFamily)
    torch.manual_seed(1)
    for weight in trainable(family.model).values():
        nn.init.normal_(weight, std=0.3)
    family.save_lora(tmp_path, lora_weights(family.model))
    ours = own_samples(family)
    pipe = pipeline(tiny, adapter)
    pipe.load_lora_weights(tmp_path)
    assert distance(ours, sampled(pipe)) < 1e-4
    assert distance(ours, plain) > 0.05


@pytest.mark.parametrize(("where", "temporal", "spatial"), [("spatial", 0, 1), ("motion", 1, 0), ("both", 1, 1)])
def test_where_the_lora_is(tiny, adapter, where, temporal, spatial):
    """Attention layers have four projections, each with two LoRA weights; 14 are temporal (7 modules), 8 spatial."""
    unet = load(tiny, adapter).model
    make_trainable(unet, ModelConfig(precision="bf16", lora_on=where), seed=0, family=UNetFamily)
    names = trainable(unet)
    assert sum("motion_modules" in name for name in names) == temporal * 14 * 4 * 2
    assert sum("motion_modules" not in name for name in names) == spatial * 8 * 4 * 2
    assert {weight.dtype for weight in names.values()} == {torch.float32}
    assert {weight.dtype for name, weight in unet.named_parameters() if name not in names} == {torch.bfloat16}


def test_full_weights_load_as_a_pipeline_and_again(tiny, adapter, tmp_path):
    family = load(tiny, adapter, beta_schedule="scaled_linear")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in family.model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    family.save(tmp_path / "saved")
    pipe = AnimateDiffPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(pipe.unet, UNetMotionModel)
    for name, weight in family.model.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight)
    pipe.set_progress_bar_config(disable=True)
    ours = own_samples(family)
    assert distance(ours, sampled(pipe)) < 1e-4
    again = AnimateDiff.load(str(tmp_path / "saved"), CPU, frames=FRAMES)
    assert torch.equal(own_samples(again), ours)
    with pytest.raises(ConfigError, match="data.frames = 7: this motion adapter supports at most 6"):
        AnimateDiff.load(str(tmp_path / "saved"), CPU, frames=7)


def test_pictures_of_clips_show_frames_beside_each_other():
    clip = np.stack([np.full((8, 8, 3), 10 * frame, np.uint8) for frame in range(16)])
    image = np.asarray(side_by_side(["x"], {"base": clip[None], "now": clip[None] + 1}, cell=20, caption_width=30))
    shown = [0, 2, 4, 6, 9, 11, 13, 15]
    expected = [10 * frame for frame in shown] + [10 * frame + 1 for frame in shown]
    assert [image[24 + 10, 30 + 20 * place + 10, 0] for place in range(16)] == expected
    assert image.shape == (44, 30 + 16 * 20, 3)


# Refused models and settings


def broken(folder, adapter, damage):
    place = shutil.copytree(adapter, folder / "broken")
    damage(place)
    return place


def pickled(place):
    (place / "diffusion_pytorch_model.safetensors").rename(place / "diffusion_pytorch_model.bin")


def truncated(place):
    file = place / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def without_config(place):
    (place / "config.json").unlink()


def another_class(place):
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"_class_name": "ControlNetModel"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "pickled weights are not loaded"),
        (truncated, "could not be loaded as a MotionAdapter"),
        (without_config, "has no config.json"),
        (another_class, "is a ControlNetModel; a MotionAdapter is needed"),
    ],
)
def test_broken_adapters_are_refused(tiny, adapter, tmp_path, damage, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(tiny, broken(tmp_path, adapter, damage))
    assert "broken" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_out_channels": (16, 16)}, r"block_out_channels is \(16, 16\), the UNet's .* \(16, 32\)"),
        ({"block_out_channels": (16, 32, 32)}, "block_out_channels"),
        ({"motion_layers_per_block": 2}, "motion_layers_per_block is 2, the UNet's layers_per_block is 1"),
        ({"motion_norm_num_groups": 4}, "motion_norm_num_groups"),
        ({"conv_in_channels": 9}, "PIA"),
        ({"motion_max_seq_length": 4}, "data.frames = 5: this motion adapter supports at most 4 frames"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_before_weights_are_read(tiny, tmp_path, monkeypatch, settings, message):
    place = tiny_adapter(tmp_path / "adapter", **settings)
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    with pytest.raises(ConfigError, match=message):
        load(tiny, place)


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "does not exist, and is not a hub"), ("mm.ckpt", "is a single file.*MotionAdapter.from_single_file")],
)
def test_adapters_that_are_not_there_are_refused(tiny, place, message):
    with pytest.raises(ConfigError, match="model.motion_adapter.*" + message):
        load(tiny, place)


def with_index(folder, old, new):
    folder.write_text(folder.read_text().replace(old, new))


def test_other_bases_are_refused(tiny, adapter, tmp_path):
    xl = shutil.copytree(tiny, tmp_path / "xl")
    with_index(xl / "model_index.json", '"StableDiffusionPipeline"', '"StableDiffusionXLPipeline"')
    with pytest.raises(ConfigError, match="StableDiffusionXLPipeline, the SD-1.5 format"):
        load(xl, adapter)
    odd = shutil.copytree(tiny, tmp_path / "odd")
    with_index(odd / "unet" / "config.json", '"resnet_time_scale_shift": "default"', '"resnet_time_scale_shift": "x"')
    with pytest.raises(ConfigError, match="resnet_time_scale_shift = 'x', which AnimateDiff does not support"):
        load(odd, adapter)
    with pytest.raises(ConfigError, match="it is a StableDiffusionPipeline"):
        AnimateDiff.load(str(tiny), CPU, frames=FRAMES)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"lora_on": "motion"}}, "model.lora_on = 'motion' is for clips only: set model.motion_adapter"),
        ({"model": {"temporal_attention": "triton"}}, "model.temporal_attention = 'triton' is for clips only"),
        ({"data": {"frames": 8}}, "data.frames = 8 is for clips only"),
        ({"data": {"flip": True}}, "data.flip = True is for clips only"),
        ({"data": {"frames": 0}}, "data.frames = 0"),
        (
            {"model": {"train": "full", "lora_on": "motion", "motion_adapter": "x"}},
            "lora_on = 'motion' needs model.train = lora",
        ),
        ({"model": {"beta_schedule": "cosine"}}, "model.beta_schedule = 'cosine'"),
    ],
)
def test_settings_of_the_other_family_are_refused(sections, message):
    with pytest.raises(ConfigError, match=message):
        validate_model(parse_config(sections))


def test_loading_says_nothing(tiny, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tiny, adapter)


def test_v_prediction_bases_keep_their_target(tmp_path, adapter):
    base = tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    assert NoiseSchedule(load(base, adapter).scheduler_config).prediction_type == "v_prediction"


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_an_adapter_whose_weights_have_other_names_is_refused(tiny, adapter, tmp_path, change):
    """Such as a file in the original format that was renamed and put into a diffusers folder."""
    other = shutil.copytree(adapter, tmp_path / "other")
    file = other / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "proj_in" in name)
    weight = tensors.pop(name)
    if change == "renamed":
        tensors[f"module.{name}"] = weight
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"lacks 1 weights of MotionAdapter, such as {name}"):
        AnimateDiff.load(str(tiny), CPU, motion_adapter=str(other), frames=4)
