"""The Stable Diffusion family against diffusers' own parts."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from seppo_fast.errors import ConfigError
from seppo_fast.families.sd import StableDiffusion
from tests.tiny import tiny_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tiny):
    return StableDiffusion.load(str(tiny), CPU)


@pytest.fixture(scope="module")
def pipe(tiny):
    return StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)


def test_prompts_are_encoded_as_the_pipeline_does(family, pipe):
    prompts = ["a fox", "", "a prompt that is longer than sixteen letters by far"]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(prompts, CPU, 1, False)
    assert torch.equal(family.encode_prompts(prompts), expected)


def test_pictures_become_scaled_latents_and_back(family, pipe):
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    latents = family.encode_images(pictures)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(pictures.numpy() / 255.0)
        expected = pipe.vae.encode(pixels.float()).latent_dist.mean * pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-6)
    np_images = pipe.image_processor.postprocess(decoded, output_type="np")
    assert np.abs(family.decode(latents).astype(int) - np_images * 255).max() <= 0.51
    assert latents.shape[1:] == family.latent_shape(16)


def test_fingerprint_follows_what_the_encoders_write(tiny, tmp_path, family):
    assert StableDiffusion.load(str(tiny), CPU).fingerprint() == family.fingerprint()
    other = StableDiffusion.load(str(tiny_pipeline(tmp_path / "other", seed=1)), CPU).fingerprint()
    assert other["vae"] != family.fingerprint()["vae"]
    assert other["text_encoder"] != family.fingerprint()["text_encoder"]
    assert other["tokenizer"] == family.fingerprint()["tokenizer"]
    half = StableDiffusion.load(str(tiny), CPU, torch.bfloat16)
    assert half.fingerprint()["dtype"] != family.fingerprint()["dtype"]
    assert half.unet.dtype == half.pipe.vae.dtype == torch.float32


def test_resolutions_that_do_not_divide_are_refused(family):
    assert family.latent_shape(24) == (4, 12, 12)
    with pytest.raises(ConfigError, match="multiple of 4"):
        family.latent_shape(18)


def test_v_prediction_pipelines_train(tmp_path):
    from seppo_fast.train import train
    from tests.runs import log_of, tiny_config

    pipeline = tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    config = tiny_config(pipeline, tmp_path, objective="seppo-newest")
    train(config)
    log = log_of(config)
    assert log[0]["logit_abs"] == log[2]["logit_abs"] == 0 and log[1]["logit_abs"] > 0


def test_other_pipelines_are_refused(tiny, tmp_path):
    import shutil

    folder = shutil.copytree(tiny, tmp_path / "other")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"StableDiffusionXLPipeline"'))
    with pytest.raises(ConfigError, match="StableDiffusionXLPipeline"):
        StableDiffusion.load(str(folder), CPU)


def test_an_inpainting_model_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "inpainting")
    config = UNet2DConditionModel.load_config(folder / "unet")
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match="its UNet takes 9 channels and gives 4, .* of its VAE have 4"):
        StableDiffusion.load(str(folder), torch.device("cpu"))
