"""The trainer, end to end on a tiny pipeline: exactness at equal weights, learning, and what it writes."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from seppo_fast.config.load import to_yaml
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.config.schema import LogConfig
from seppo_fast.methods.pairs import noised
from seppo_fast.models.denoiser import Denoiser
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import collected, log_of, tiny_config, weights_of
from tests.helpers.same_run import assert_same_run

ROOT = Path(__file__).parents[2]


MODELS = {
    "full": {},
    "full fp16": {"precision": "fp16"},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"train": "lora"},
    "lora bf16": {"train": "lora", "precision": "bf16"},
}


@pytest.mark.parametrize(
    "model", MODELS.values(), ids=MODELS.keys(),
)  # fmt: skip
@pytest.mark.parametrize("train_keys", [{}, {"share_noise": False, "micro_batch": 1}], ids=["shared", "independent"])
def test_equal_weights_give_a_difference_of_exactly_zero(tiny, tmp_path, model, train_keys):
    """At the start of each iteration of `seppo-newest`, policy and reference have the same weights."""
    keys = {"beta": 20.0, **train_keys}  # at this beta the initial loss scale of fp16 causes no overflow
    config = tiny_config(tiny, tmp_path, objective="seppo-newest", model=model, train=keys)
    train(config)
    log = log_of(config)
    for entry in (log[0], log[2]):
        assert entry["logit_abs"] == 0 and entry["margin"] == 0
        assert entry["winner_error"] == entry["ref_winner_error"]
        assert entry["loser_error"] == entry["ref_loser_error"]
        assert entry["aaf_rate"] == 1
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert entry["grad_norm"] > 0
    assert log[1]["logit_abs"] > 0 and not any(entry["skipped"] for entry in log)


ON_WINNERS = [name for name, row in OBJECTIVES.items() if not (row.needs_pairs or row.needs_labels or row.reward)]


@pytest.mark.parametrize("objective", ON_WINNERS)
def test_every_objective_on_winners_trains(tiny, tmp_path, objective):
    drawn = []

    def observe(trainer, updates):
        if updates == 0 and trainer.references is not None:
            resident = trainer.references.resident
            trainer.references.resident = lambda unet, index, aside: drawn.append(index) or resident(unet, index, aside)

    keys = {"train": {"updates": 6}, "reference": {"window": 1}}
    if OBJECTIVES[objective].flipper == "scorer":  # with 2000 the loss of learned pairs falls to exactly 0 here
        keys = {"train": {"updates": 6, "beta": 20.0}, "reference": {"window": 1, "judge": "brightness"}}
    if OBJECTIVES[objective].replay:  # which always samples a whole iteration at once
        keys["reference"] = {}
    config = tiny_config(tiny, tmp_path, objective=objective, **keys)
    train(config, observe)
    log = log_of(config)
    assert [entry["update"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in log)
    draw = OBJECTIVES[objective].draw
    if OBJECTIVES[objective].replay:  # the newest samples once per iteration, and the initial policy is the reference
        assert drawn == [0, 0, 0, 1, 0, 0, 2, 0, 0]
        return
    assert len(drawn) == (0 if draw is None else 6)
    if draw == "initial":
        assert drawn == [0] * 6
    elif draw == "newest":
        assert drawn == [0, 0, 1, 1, 2, 2]
    elif draw == "uniform":
        assert drawn[0] == drawn[1] == 0 and drawn[2] == drawn[3] <= 1 and drawn[4] == drawn[5] <= 2


def test_redraw_each_update(tiny, tmp_path):
    numbers = []
    config = tiny_config(tiny, tmp_path, reference={"redraw": "update"}, train={"updates": 4})

    def observe(trainer, updates):
        if updates == 0:
            draw = trainer.references.draw
            trainer.references.draw = lambda number, *count: (
                ((count or numbers.append(number)) and None) or draw(number, *count)
            )

    train(config, observe)
    assert numbers == [0, 1, 2, 3]


def test_a_run_repeats_bit_for_bit_and_a_seed_changes_it(tiny, tmp_path):
    finals = []
    for number, seed in enumerate((5, 5, 6)):
        seen = {}
        config = tiny_config(tiny, tmp_path, seed=seed, output=str(tmp_path / str(number)))
        train(config, lambda trainer, updates, seen=seen: seen.update(weights_of(trainer)))
        finals.append(seen)
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert any(not torch.equal(finals[0][name], finals[2][name]) for name in finals[0])


def test_overfitting_one_pair_drives_the_winners_error_down(tiny, tmp_path):
    seen = []

    def observe(trainer, updates):
        if updates in (0, 100):
            if updates == 0:
                # one example, 64 times and noises
                seen.append(trainer.method.rollout.maker.pairs(10_000, range(64)))
            with torch.no_grad():
                shown = noised(seen[0], trainer.family.schedule, trainer.denoiser.device)
                prediction = trainer.denoiser.denoise(trainer.policy, *shown[:3])
            seen.append((prediction - shown.target).square().mean().item())

    config = tiny_config(
        tiny, tmp_path, data={"source": "shapes:1:3", "prompt_dropout": 0.0},
        train={
            "updates": 100, "updates_per_iteration": 20, "pairs_per_update": 8, "micro_batch": 8, "learning_rate": 3e-3,
            "beta": 20.0,  # at 2000 the logits of so small a problem saturate and nothing more is learned
        },
    )  # fmt: skip
    train(config, observe)
    before, after = seen[1:]
    # The target is unit noise: 1 is the error of always predicting 0.
    assert after < 1 < before, f"winner error {before:.3f} -> {after:.3f}"


def test_never_pushes_samples_away_where_adaptive_learns_from_them(tiny, tmp_path):
    """With a reference that is better everywhere, the anchor test says to learn; without it, samples are unlearned."""
    errors = {}
    for objective in ("seppo", "seppo-never"):
        config = tiny_config(
            tiny, tmp_path, objective=objective, output=str(tmp_path / objective),
            train={"updates": 30, "learning_rate": 1e-3, "beta": 100.0},
        )  # fmt: skip
        trainer = Trainer(config)
        trainer.references.add(trainer.policy)
        pairs = collected(trainer, 0)
        better = replace(pairs, ref_error=0.2 * pairs.ref_error)
        entries = [trainer.learner.step(better, update) for update in range(30)]
        assert entries[0]["aaf_rate"] == 0
        errors[objective] = [(entry["winner_error"], entry["loser_error"]) for entry in (entries[0], entries[-1])]
    (winner, loser), (winner_adaptive, loser_adaptive) = errors["seppo"]
    assert errors["seppo-never"][0] == (winner, loser)
    winner_never, loser_never = errors["seppo-never"][1]
    assert winner_adaptive < winner and loser_adaptive < loser, errors
    assert loser_never > loser and winner_never > winner_adaptive, errors


def test_full_weights_load_in_diffusers(tiny, tmp_path):
    seen = {}
    config = tiny_config(tiny, tmp_path)
    folder = train(config, lambda trainer, updates: seen.update(weights_of(trainer)))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert all(torch.equal(weight, seen[name]) for name, weight in pipe.unet.named_parameters())
    assert pipe("a fox", num_inference_steps=1, output_type="np", height=16, width=16).images.shape == (1, 16, 16, 3)
    assert not list(Path(config.output).glob(".tmp*"))


def test_pipelines_of_half_precision_encoders_are_saved_as_they_were_loaded(tiny, tmp_path):
    """On a GPU the encoders compute in half precision; the exported pipeline must still load and run on its own."""
    family = StableDiffusion.load(str(tiny), torch.device("cpu"), torch.bfloat16)
    assert family.encode_prompts(["a fox"])[0]["prompt_embeds"].dtype == torch.bfloat16
    family.save(tmp_path / "saved")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe("a fox", num_inference_steps=1, output_type="np", height=16, width=16).images.shape == (1, 16, 16, 3)


ON_A_GPU = {name: (model, "ahead") for name, model in MODELS.items()} | {
    "full compiled": ({"precision": "bf16", "compile": True}, "ahead"),
    "full apart": ({"precision": "bf16"}, "apart"),
    "lora together": (MODELS["lora bf16"], "together"),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("model", "errors"), ON_A_GPU.values(), ids=ON_A_GPU.keys())
def test_equal_weights_give_exactly_zero_on_a_gpu(tiny, tmp_path, model, errors):
    keys = {"train": {"beta": 20.0}, "reference": {"errors": errors}}
    config = tiny_config(tiny, tmp_path, objective="seppo-newest", model=model, **keys)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    words = [sys.executable, "-m", "seppo_fast.train", str(tmp_path / "run.yaml")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = log_of(config)[0]
    assert first["logit_abs"] == 0 and first["aaf_rate"] == 1


def test_lora_loads_in_diffusers_and_predicts_alike(tiny, tmp_path):
    seen = {}
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 700]))
    embeds = torch.randn(2, 16, 16, generator=generator)

    def observe(trainer, updates):
        with torch.no_grad():
            seen[updates] = trainer.policy(*inputs, encoder_hidden_states=embeds).sample

    folder = train(tiny_config(tiny, tmp_path, model={"train": "lora"}, train={"learning_rate": 1e-2}), observe)
    pipe = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipe.load_lora_weights(folder)
    with torch.no_grad():
        loaded = pipe.unet(*inputs, encoder_hidden_states=embeds).sample
    torch.testing.assert_close(loaded, seen[3], rtol=1e-5, atol=1e-6)
    assert (seen[3] - seen[0]).abs().max() > 1e-3


def test_moving_average_is_what_is_exported(tiny, tmp_path):
    steps = []
    config = tiny_config(tiny, tmp_path, train={"ema_decay": 0.5})
    folder = train(config, lambda trainer, updates: steps.append(weights_of(trainer)))
    name = "conv_in.weight"
    average = steps[0][name].double()
    for update, step in enumerate(steps[1:], 1):
        decay = (
            0.0 if update == 1 else min(0.5, update / (9 + update))
        )  # diffusers' EMAModel: (1 + s)/(10 + s) at s - 1
        average = decay * average + (1 - decay) * step[name].double()
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    exported = dict(pipe.unet.named_parameters())[name].double()
    torch.testing.assert_close(exported, average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(exported.float(), steps[-1][name])


def test_pictures_of_samples(tiny, tmp_path, monkeypatch):
    """All start from the same noise and prompts, without dropout of any kind, and they do not change the run."""
    pipeline = shutil.copytree(tiny, tmp_path / "pipeline")
    for part, dropout in (("unet", "dropout"), ("text_encoder", "attention_dropout")):
        file = pipeline / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {dropout: 0.5}))
    started, sample = [], Denoiser.sample

    def recording(denoiser, model, sampler, noise, own, uncond):
        if len(noise) == 3:  # a rollout has batches of 4 and 2
            started.append((noise, own["prompt_embeds"], uncond["prompt_embeds"]))
        return sample(denoiser, model, sampler, noise, own, uncond)

    def observe(trainer, updates):
        if updates == 0:
            assert trainer.policy.config.dropout == trainer.family.pipe.text_encoder.config.attention_dropout == 0.5
            assert np.array_equal(trainer.recorder.samples.generate(), trainer.recorder.samples.base)

    monkeypatch.setattr(Denoiser, "sample", recording)
    keys = {"data": {"prompt_dropout": 0.8}, "objective": "seppo-newest"}
    log = {"sample_every": 2, "sample_prompts": ["a fox", "b", "c"]}
    config = tiny_config(pipeline, tmp_path, log=log, train={"updates": 4}, **keys)
    train(config, observe)
    assert len(started) == 4  # the base, again in `observe`, and after updates 2 and 4
    for ours in started[1:]:
        assert all(torch.equal(one, base) for one, base in zip(ours, started[0], strict=True))
    assert len({row.numpy().tobytes() for row in started[0][1]}) == 3  # no prompt was dropped
    assert log_of(config)[0]["logit_abs"] == 0  # and a policy does not differ from itself
    first, second = sorted((Path(config.output) / "samples").iterdir())
    assert (first.name, second.name) == ("update-000002.png", "update-000004.png")
    one, other = (np.asarray(Image.open(file)) for file in (first, second))
    assert one.shape == (24 + 3 * 128, 260 + 2 * 128, 3) and one[30:, 260:].std() > 1
    assert np.array_equal(one[24:, :388], other[24:, :388]) and not np.array_equal(one[24:, 388:], other[24:, 388:])
    without = config.model_copy(update={"output": str(tmp_path / "without"), "log": LogConfig(sample_every=0)})
    train(without)
    assert_same_run(without, config)


def test_a_run_that_ends_before_its_first_update_leaves_nothing(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, log={"sample_every": 1})
    Trainer(config)
    assert not Path(config.output).exists()


def test_the_output_folder_must_be_free(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        train(config)
    assert (tmp_path / "run" / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("objective", ["seppo-r", "diffusion-dpo"])
def test_pairs_are_asked_for_where_there_are_none(tiny, tmp_path, objective):
    with pytest.raises(ConfigError, match="two images per prompt"):
        train(tiny_config(tiny, tmp_path, objective=objective))
    assert not (tmp_path / "run").exists()


def test_triton_backend_follows_the_torch_one(tiny, tmp_path):
    """Runs in Triton's interpreter and in separate processes: Triton chooses it when kernels are defined."""
    script = (
        "import sys; from seppo_fast.cli import main; "
        "sys.exit(main(['train', sys.argv[1], '--output', sys.argv[2], '--train.backend', sys.argv[3]]))"
    )
    config = tiny_config(tiny, tmp_path, train={"updates": 4, "beta": 200.0})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    logs = {}
    for backend in ("torch", "triton"):
        output = tmp_path / backend
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "run.yaml"), str(output), backend],
            env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        logs[backend] = log_of(config.model_copy(update={"output": str(output)}))
    for ours, twin in zip(logs["triton"], logs["torch"], strict=True):
        assert ours["aaf_rate"] == twin["aaf_rate"]
        for name in ("loss", "winner_error", "loser_error", "ref_winner_error", "ref_loser_error"):
            assert ours[name] == pytest.approx(twin[name], rel=2e-4, abs=2e-5), name
    assert logs["triton"][0]["logit_abs"] == 0
