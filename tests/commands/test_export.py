"""Exports: loaded by diffusers, they make the same pictures as the run."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from seppo_fast.cli import main
from seppo_fast.commands.export import COMFYUI_FILE, export, model_card, reference_facts
from seppo_fast.config.load import parse_config
from seppo_fast.evaluation.generate import generate
from seppo_fast.evaluation.scores import Scores
from seppo_fast.evaluation.statistics import PairedDifference
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.unet import UNetFamily
from seppo_fast.runs.checkpoint import SavedState, saved_states
from seppo_fast.train import train
from tests.helpers.runs import tiny_config
from tests.helpers.tiny import tiny_pipeline

SAMPLER = "sampler of the references"
PROMPTS = ["a small red circle", "a large blue square"]


def trained(tiny, folder, **sections):
    """Trains a run; returns its configuration and the final pictures of the raw weights and the moving average."""
    config = tiny_config(tiny, folder, **sections)
    held = {}

    def observe(trainer, updates):
        held["trainer"] = trainer
        if updates == config.train.updates:
            held["raw"] = pictures_of(trainer)

    train(config, observe)  # afterwards the policy's weights are the average
    held["average"] = pictures_of(held["trainer"])
    return config, held


def pictures_of(trainer):
    family = trainer.family
    return generate(family, trainer.denoiser, trainer.policy, trainer.sampler, PROMPTS, resolution=16, seed=3)


def by_diffusers(pipe, config):
    """Returns pictures of the same prompts and seed by a diffusers pipeline, with the family's sampler."""
    from seppo_fast.models.families.sd15 import StableDiffusion

    family = StableDiffusion(pipe, torch.device("cpu"), torch.float32)
    sampler = family.sampler(config.sampler, family.latent_shape(16))
    return generate(family, Denoiser(family, torch.float32), pipe.unet, sampler, PROMPTS, resolution=16, seed=3)


def close(ours, theirs):
    """Returns whether pictures differ by at most 1 per pixel value; merging a LoRA adds in another order."""
    return np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


# Rates at which the pixels of average and last weights differ; a fresh LoRA changes little.
@pytest.mark.parametrize(("weights", "rate"), [("full", 5e-3), ("lora", 0.1)])
@pytest.mark.parametrize("raw", [False, True], ids=["average", "raw"])
def test_a_pipeline_folder_makes_the_runs_pictures(tiny, tmp_path, weights, rate, raw):
    config, made = trained(tiny, tmp_path, model={"train": weights}, train={"ema_decay": 0.5, "learning_rate": rate})
    folder = export(Path(config.output), "diffusers", raw=raw)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pictures = by_diffusers(pipe, config)
    wanted, other = (made["raw"], made["average"]) if raw else (made["average"], made["raw"])
    assert close(pictures, wanted) and not close(pictures, other)


def test_a_lora_makes_the_runs_pictures_in_both_formats(tiny, tmp_path):
    config, made = trained(tiny, tmp_path, model={"train": "lora", "lora_rank": 3}, train={"learning_rate": 0.1})
    run = Path(config.output)
    folder = export(run)
    for source, name in ((folder, None), (export(run, "comfyui"), COMFYUI_FILE)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
        assert not close(by_diffusers(pipe, config), made["raw"])
        pipe.load_lora_weights(source, **({} if name is None else {"weight_name": name}))
        assert close(by_diffusers(pipe, config), made["raw"])


def test_comfyui_key_names_are_those_of_kohya(tiny, tmp_path):
    config, _ = trained(tiny, tmp_path, model={"train": "lora", "lora_rank": 3})
    with safe_open(export(Path(config.output), "comfyui") / COMFYUI_FILE, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        place = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
        assert {f"{place}.lora_down.weight", f"{place}.lora_up.weight", f"{place}.alpha"} <= names
        assert all(name.count(".") <= 2 and name.startswith("lora_unet_") for name in names)
        assert file.get_tensor(f"{place}.lora_down.weight").shape[0] == 3
        assert file.get_tensor(f"{place}.alpha").item() == 3
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "3"
    assert (metadata["ss_v2"], metadata["ss_base_model_version"]) == ("False", "sd_v1")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


@pytest.mark.parametrize(
    ("width", "prediction", "expected"),
    [
        (768, "epsilon", ("False", "sd_v1", "stable-diffusion-v1/lora", "epsilon")),
        (1024, "epsilon", ("True", "sd_v2", "stable-diffusion-v2-512/lora", "epsilon")),
        (1024, "v_prediction", ("True", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v")),
    ],
)
def test_a_lora_says_which_model_it_is_for(width, prediction, expected):
    model = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width))
    family = SimpleNamespace(model=model, scheduler_config={"prediction_type": prediction})
    weights = {"mid_block.attentions.0.to_q.lora_A.weight": torch.zeros(4, 8)}
    _, metadata = UNetFamily.comfyui_lora(family, weights, 4)
    keys = ("ss_v2", "ss_base_model_version", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(metadata[key] for key in keys) == expected


def test_the_card_says_what_it_is_and_the_settings_go_with_it(tiny, tmp_path):
    config, _ = trained(tiny, tmp_path, model={"train": "lora"}, seed=9)
    folder = export(Path(config.output), output=tmp_path / "mine")
    assert folder == tmp_path / "mine"
    card = (folder / "README.md").read_text()
    assert "| seed | 9 |" in card and "| data | shapes:11:3, 16 pixels |" in card and "no score" in card
    assert str(tiny) in card
    assert "Method: SePPO (SePPO-w), eq. 8-10 and Algorithm 1 (Semi-Policy Preference Optimization, arXiv" in card
    assert parse_config(__import__("yaml").safe_load((folder / "seppo_fast.yaml").read_text())).seed == 9


def test_the_card_quotes_the_runs_scores_and_says_of_which_weights(tiny, tmp_path):
    config, _ = trained(tiny, tmp_path, model={"train": "lora"}, train={"ema_decay": 0.5})
    run = Path(config.output)
    Scores("the judge's score", 3, True, PairedDifference(0.814, 0.829, 0.015, 0.002, 0.028, 1200)).write(run)
    card = (export(run) / "README.md").read_text()
    assert "the judge's score: base 0.814, after update 3 (moving average) 0.829; paired difference +0.015" in card
    assert "[+0.002, +0.028] (95 %, 1200 pairs)." in card and "other weights" not in card
    card = (export(run, raw=True) / "README.md").read_text()
    assert "They were measured on other weights of this run than the exported ones." in card


def test_the_card_names_the_method_that_trained(tiny, tmp_path):
    config, _ = trained(tiny, tmp_path, model={"train": "lora"}, objective="sft")
    card = (export(Path(config.output)) / "README.md").read_text()
    assert "Method: supervised fine-tuning on the winners.\n" in card and "tags: [seppo_fast, sft, lora]" in card
    assert "SePPO" not in card and "Semi-Policy" not in card


def test_a_base_that_moved_is_found_and_one_that_changed_refused(tiny, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    config, _ = trained(base, tmp_path, model={"train": "lora"})
    base.rename(tmp_path / "moved")
    assert main(["export", config.output]) == 2
    said = capsys.readouterr().err
    assert "does not exist" in said and "--model PATH" in said
    assert main(["export", config.output, "--model", str(tmp_path / "moved")]) == 0
    other = tiny_pipeline(tmp_path / "other", seed=1)
    assert main(["export", config.output, "--model", str(other)]) == 2
    said = capsys.readouterr().err
    assert "the model changed" in said and "--model PATH" in said and "another output" not in said


def test_mistakes_say_what_to_do(tiny, tmp_path, capsys):
    config, _ = trained(tiny, tmp_path)
    run = Path(config.output)
    for words, code, said in (
        (["export", str(run), "--format", "lora"], 2, "there is no LoRA; use --format diffusers"),
        (["export", str(tmp_path / "none")], 2, "none: does not exist; name the folder of a run"),
        (["export", str(tmp_path)], 2, "not the folder of a run with a saved state"),
        (["export", str(run), "--output", str(tmp_path)], 2, "already exists"),
    ):
        assert main(words) == code
        assert said in capsys.readouterr().err
    assert main(["export", str(run)]) == 0
    assert "exists" not in capsys.readouterr().out
    assert main(["export", str(run)]) == 0
    first, second = run / "export-diffusers", run / "export-diffusers-2"
    assert capsys.readouterr().out.startswith(f"{first} exists and is kept; this export is written to {second}\n")
    assert (run / "export-diffusers").is_dir() and (run / "export-diffusers-2").is_dir()
    for folder in saved_states(run):
        (folder / "policy.safetensors").write_bytes(b"")
    assert main(["export", str(run)]) == 6
    assert "none of its" in capsys.readouterr().err
    assert not [path for path in run.iterdir() if path.name.startswith(".tmp")]


def rewarded(objective, **rl):
    train = {"beta": 1.0, "updates": 4, "updates_per_iteration": 2}
    settings = {"train": train, "data": {"prompt_dropout": 0}, "sampler": {"steps": 8, "guidance": 1.0}}
    return {"objective": objective, "rl": {"reward": "shapes", **rl}, **settings}


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({}, {"references", SAMPLER}),
        ({"objective": "seppo-judged", "reference": {"judge": "shapes"}}, {"references", SAMPLER, "judge"}),
        ({"objective": "seppo-initial"}, {"reference", SAMPLER}),
        ({"objective": "ditto"}, {"reference", SAMPLER}),
        ({"objective": "kto"}, {"reference"}),
        ({"objective": "mapo", "train": {"beta": 0.1}}, set()),
        ({"objective": "sft"}, set()),
        (rewarded("grpo"), {"samples", "reward"}),
        (rewarded("nft", kl=0.1), {"samples", "reward", "reference"}),
        (rewarded("spo"), {"samples", "reward", "reference"}),
    ],
)
def test_a_model_card_names_only_what_the_objective_has(tree, names):
    facts = reference_facts(parse_config(tree))
    assert set(facts) == names
    for scorer in {"judge", "reward"} & names:
        assert facts[scorer] == "shapes; scores by the same scorer are no evidence of quality"


def test_a_model_card_says_what_an_objective_with_a_reward_learned_from():
    saved = SavedState(Path("update-000004"), 4, {})
    card = model_card(parse_config(rewarded("grpo")), saved, "diffusers", False, None)
    assert "| data | prompts of " in card and "| updates | 4 of 2048 samples, learning rate" in card
    assert "| objective | grpo |" in card  # without a beta
    assert "| samples | its own, 8 per prompt, made anew every 2 updates; ddim, 8 steps, guidance 1, eta 1 |" in card
    assert "the limits of its base and of the reward that it" in card
    assert ", beta 1 (times log-ratios of steps) |" in model_card(
        parse_config(rewarded("d3po")), saved, "diffusers", False, None
    )
