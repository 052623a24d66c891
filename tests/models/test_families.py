"""The Stable Diffusion family: compared with diffusers' own parts, and the folders that it loads or refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import dummy_torch_and_scipy_objects, import_utils
from safetensors.torch import load_file, save_file

from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.utils.errors import ConfigError
from tests.helpers.calls import encoded
from tests.helpers.tiny import tiny_pipeline

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
    assert torch.equal(encoded(family, prompts)["prompt_embeds"], expected)


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
    assert half.model.dtype == half.pipe.vae.dtype == torch.float32


def test_resolutions_that_do_not_divide_are_refused(family):
    assert family.latent_shape(24) == (4, 12, 12)
    with pytest.raises(ConfigError, match="multiple of 4"):
        family.latent_shape(18)


def test_v_prediction_pipelines_train(tmp_path):
    from seppo_fast.train import train
    from tests.helpers.runs import log_of, tiny_config

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
    with pytest.raises(ConfigError, match="its UNet has 9 input and 4 output channels, .* of its VAE have 4"):
        StableDiffusion.load(str(folder), torch.device("cpu"))


def changed(folder, name, **keys):
    """Sets keys of a JSON file in a folder; None removes a key."""
    file = folder / name
    tree = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


@pytest.mark.parametrize("limit", [None, 512, 10**30], ids=str)
def test_prompts_are_as_long_as_the_text_encoder_takes_whatever_the_tokenizer_says(tiny, tmp_path, family, limit):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    changed(folder / "tokenizer", "tokenizer_config.json", model_max_length=limit)
    other = StableDiffusion.load(str(folder), CPU)
    prompts = ["a fox", "a prompt that is longer than sixteen letters by far"]
    assert torch.equal(encoded(other, prompts)["prompt_embeds"], encoded(family, prompts)["prompt_embeds"])
    assert other.too_long(prompts) == family.too_long(prompts) == prompts[1:]
    assert other.fingerprint() == family.fingerprint()  # one cache serves both
    other.save(tmp_path / "saved")
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert saved.tokenizer.model_max_length == 16


def as_variant(folder, parts, variant="fp16", keep=False):
    """Turns the weights of some parts of a pipeline folder into a variant: renames them and changes their dtype."""
    for part in parts:
        (plain,) = (folder / part).glob("*.safetensors")
        halves = {name: tensor.half() for name, tensor in load_file(plain).items()}
        save_file(halves, plain.with_name(f"{plain.stem}.{variant}.safetensors"), metadata={"format": "pt"})
        if not keep:
            plain.unlink()
    return folder


PARTS = ("unet", "vae", "text_encoder")


@pytest.mark.parametrize(
    ("parts", "variant"), [(PARTS, "fp16"), (("unet",), "fp16"), (("text_encoder",), "non_ema")], ids=str
)
def test_parts_that_are_there_as_a_variant_only_are_loaded(tiny, tmp_path, family, parts, variant):
    folder = as_variant(shutil.copytree(tiny, tmp_path / "copy"), parts, variant)
    loaded = StableDiffusion.load(str(folder), CPU)
    for part in PARTS:
        ours, theirs = (dict(x.pipe.components[part].state_dict()) for x in (loaded, family))
        for name, tensor in theirs.items():
            expected = tensor.half().float() if part in parts and tensor.is_floating_point() else tensor
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], expected), (part, name)


def test_plain_weights_come_before_a_variant(tiny, tmp_path, family):
    folder = as_variant(shutil.copytree(tiny, tmp_path / "copy"), PARTS, keep=True)
    assert StableDiffusion.load(str(folder), CPU).identity() == family.identity()


def renamed(folder, part, rename):
    """Renames the weights of one part of a pipeline folder."""
    (file,) = (folder / part).glob("*.safetensors")
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def test_text_encoders_of_older_and_newer_transformers_are_the_same(tiny, tmp_path, family):
    """In transformers up to 5.5, names of a CLIPTextModel's weights begin with `text_model.`; saved files use these."""
    assert "text_model.final_layer_norm.bias" not in load_file(tiny / "text_encoder" / "model.safetensors")
    older = renamed(shutil.copytree(tiny, tmp_path / "older"), "text_encoder", "text_model.{}".format)
    for number, source in enumerate((tiny, older)):
        loaded = StableDiffusion.load(str(source), CPU)
        assert loaded.fingerprint() == family.fingerprint()
        loaded.save(tmp_path / f"saved-{number}")
        saved, wanted = (load_file(place / "text_encoder" / "model.safetensors") for place in (
            tmp_path / f"saved-{number}", older))  # fmt: skip
        assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert StableDiffusion.load(str(tmp_path / "saved-0"), CPU).fingerprint() == family.fingerprint()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("part", "old", "new", "missing"),
    [
        ("text_encoder", "", "transformer.text_model.", "20 weights of CLIPTextModel"),
        ("text_encoder", "q_proj", "query", "2 weights of CLIPTextModel, such as encoder.*q_proj.bias"),
        ("unet", "conv_in", "input_blocks.0.0", "2 weights of UNet2DConditionModel, such as conv_in.bias"),
        ("vae", "quant_conv", "quantise", "weights of AutoencoderKL"),
    ],
    ids=["all", "some", "unet", "vae"],
)
def test_weights_under_names_that_the_library_does_not_know_are_refused(tiny, tmp_path, part, old, new, missing):
    folder = renamed(shutil.copytree(tiny, tmp_path / "copy"), part, lambda name: name.replace(old, new, 1))
    with pytest.raises(ConfigError, match=f"{part} lacks .*{missing}"):
        StableDiffusion.load(str(folder), CPU)


def test_a_variant_in_several_files_is_loaded_and_counted(tiny, tmp_path, family):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    family.model.to(memory_format=torch.contiguous_format)
    family.model.save_pretrained(folder / "unet", variant="fp16", max_shard_size="100KB")
    family.model.to(memory_format=torch.channels_last)
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").exists()
    assert StableDiffusion.load(str(folder), CPU).identity() == family.identity()
    (shard, *_) = sorted((folder / "unet").glob("*.safetensors"))
    tensors = load_file(shard)
    tensors.popitem()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="unet"):
        StableDiffusion.load(str(folder), CPU)


def test_an_index_of_a_variant_that_leads_to_pickles_is_refused(tiny, tmp_path):
    folder = as_variant(shutil.copytree(tiny, tmp_path / "copy"), ("unet",))
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "diffusion_pytorch_model.fp16.bin"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="only safetensors files beside it are loaded"):
        StableDiffusion.load(str(folder), CPU)


HUB = """
import torch
from seppo_fast.utils.errors import ConfigError
from seppo_fast.models.families.sd15 import StableDiffusion
for name in ("somebody/tiny", "somebody/unknown", "somebody/pickled"):
    try:
        print(StableDiffusion.load(name, torch.device("cpu")).identity())
    except ConfigError as refused:
        print(refused)
"""


def test_a_hub_id_with_nothing_but_a_variant_is_loaded_and_one_of_unknown_names_refused(tiny, tmp_path):
    for name in ("tiny", "pickled", "unknown"):
        snapshot = tmp_path / f"models--somebody--{name}" / "snapshots" / "0123abcd"
        as_variant(shutil.copytree(tiny, snapshot), PARTS)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0123abcd")
        if name == "pickled":
            (file,) = (snapshot / "text_encoder").glob("*.safetensors")
            file.rename(file.with_name("pytorch_model.bin"))
    renamed(snapshot, "text_encoder", "a.b.{}".format)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", HUB], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    identity, refused, pickled = done.stdout.splitlines()[-3:]
    expected = tmp_path / "models--somebody--tiny" / "snapshots" / "0123abcd"
    assert identity == StableDiffusion.load(str(expected), CPU).identity()
    assert "lacks 20 weights of CLIPTextModel" in refused
    assert "'somebody/pickled' holds pickled weights" in pickled and "safe_serialization=True" in pickled


def test_parts_that_training_never_uses_are_not_needed(tiny, tmp_path, family):
    """The index names a feature extractor and an image encoder whose folders are missing."""
    folder = shutil.copytree(tiny, tmp_path / "copy")
    changed(
        folder,
        "model_index.json",
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
    )
    loaded = StableDiffusion.load(str(folder), CPU)
    assert loaded.identity() == family.identity() and loaded.fingerprint() == family.fingerprint()
    loaded.save(tmp_path / "saved")
    StableDiffusionPipeline.from_pretrained(tmp_path / "saved")


def test_a_scheduler_that_needs_a_package_is_not_needed(tiny, tmp_path, family, monkeypatch):
    """LMS needs scipy, but only a scheduler's settings are used; diffusers is as it is without scipy."""
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "scipy", (lambda: False, "{0} needs scipy"))
    monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", dummy_torch_and_scipy_objects.LMSDiscreteScheduler)
    with pytest.raises(ImportError, match="needs scipy"):
        diffusers.LMSDiscreteScheduler.from_config({})
    folder = shutil.copytree(tiny, tmp_path / "copy")
    changed(folder, "model_index.json", scheduler=["diffusers", "LMSDiscreteScheduler"])
    changed(folder / "scheduler", "scheduler_config.json", _class_name="LMSDiscreteScheduler")
    loaded = StableDiffusion.load(str(folder), CPU)
    assert isinstance(loaded.pipe.scheduler, DDIMScheduler)
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset"):
        assert loaded.scheduler_config[key] == family.scheduler_config[key]


def test_epsilon_without_signal_at_its_last_timestep_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    changed(folder / "scheduler", "scheduler_config.json", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ConfigError, match=r"predicts epsilon, but its last timestep keeps no signal .*0\.0e\+00"):
        NoiseSchedule(StableDiffusion.load(str(folder), CPU).scheduler_config)
    changed(folder / "scheduler", "scheduler_config.json", prediction_type="v_prediction")
    NoiseSchedule(StableDiffusion.load(str(folder), CPU).scheduler_config)


@pytest.mark.parametrize(
    ("scheduler", "settings", "said"),
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            None,
            "its scheduler is a FlowMatchEulerDiscreteScheduler and does not",
        ),
        ("CMStochasticIterativeScheduler", None, "its scheduler is a CMStochasticIterativeScheduler and does not"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "a UniPCMultistepScheduler with use_flow_sigmas and"),
    ],
    ids=["flow matching", "consistency", "flow sigmas"],
)
def test_a_scheduler_that_is_none_of_diffusion_is_refused_by_its_class(tiny, tmp_path, scheduler, settings, said):
    """Its settings have no betas and no prediction type, so the defaults (epsilon) would silently be used."""
    folder = shutil.copytree(tiny, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}))
    held = {"_class_name": scheduler, **(settings or {"num_train_timesteps": 1000})}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(held))
    with pytest.raises(ConfigError, match=said):
        StableDiffusion.load(str(folder), CPU)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_schedulers_of_diffusion_are_taken(tiny, tmp_path, family, name):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    changed(folder / "scheduler", "scheduler_config.json", _class_name=name)
    loaded = StableDiffusion.load(str(folder), CPU)
    assert loaded.schedule.prediction_type == family.schedule.prediction_type == "epsilon"
