"""Training on clips: the same loop as for pictures, on five-dimensional tensors."""

import json
import math
import os
import subprocess
import sys
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file

from seppo_fast.capacity.footprint import training_footprint
from seppo_fast.capacity.presets import apply_preset, fit_to_device
from seppo_fast.cli import main
from seppo_fast.config.load import to_yaml
from seppo_fast.evaluation.judged import judged_model
from seppo_fast.methods.pairs import noised
from seppo_fast.models.attention import GRID_LIMIT, ChunkedAttention, attention_layers
from seppo_fast.models.trainable import compile_blocks, trainable
from seppo_fast.models.unet import UNetFamily
from seppo_fast.shapes.motion import captions
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.random import keyed_noise
from tests.helpers.calls import embeds, inputs_of
from tests.helpers.runs import collected, log_of, tiny_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FRAMES = 3


def clip_config(tiny, adapter, folder, **sections):
    """Returns a `tiny_config` that trains a LoRA on clips of three frames."""
    model = {"train": "lora", "lora_rank": 2, "motion_adapter": str(adapter)} | sections.pop("model", {})
    data = {"source": "shapes-motion:5:3", "frames": FRAMES} | sections.pop("data", {})
    shorter = {"pairs_per_update": 4, "micro_batch": 3} | sections.pop("train", {})
    return tiny_config(tiny, folder, model=model, data=data, train=shorter, **sections)


def trained(config):
    """Trains; returns the final weights and the log."""
    seen = {}

    def observe(trainer, updates):
        seen.update({name: weight.detach().clone() for name, weight in trainable(trainer.policy).items()})

    train(config, observe)
    return seen, log_of(config)


def same_log(log, other, **tolerance):
    for entry, expected in zip(log, other, strict=True):
        for name, value in expected.items():
            if "seconds" not in name and "per_second" not in name and name != "memory_gib":
                assert entry[name] == pytest.approx(value, **tolerance), name


WAYS = {
    "ahead": {"reference": {"errors": "ahead"}},
    "ahead checkpointed bf16": {"model": {"gradient_checkpointing": True, "precision": "bf16"}},
    "apart": {"reference": {"errors": "apart"}},
    "together checkpointed bf16": {
        "reference": {"errors": "together"},
        "model": {"gradient_checkpointing": True, "precision": "bf16"},
    },
    "full": {"model": {"train": "full"}},
}


@pytest.mark.parametrize("sections", WAYS.values(), ids=WAYS.keys())
def test_equal_weights_give_a_difference_of_exactly_zero(tiny, adapter, tmp_path, sections):
    config = clip_config(tiny, adapter, tmp_path, objective="seppo-newest", **sections)
    train(config)
    log = log_of(config)
    for entry in (log[0], log[2]):
        assert entry["logit_abs"] == 0 and entry["margin"] == 0 and entry["aaf_rate"] == 1
        assert entry["winner_error"] == entry["ref_winner_error"] > 0
        assert entry["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert entry["grad_norm"] > 0
    assert log[1]["logit_abs"] > 0


def test_ahead_apart_and_together_train_alike(tiny, adapter, tmp_path):
    """The first two agree bit for bit; a batch of both may round differently."""
    weights, logs = {}, {}
    for errors in ("ahead", "apart", "together"):
        weights[errors], logs[errors] = trained(
            clip_config(
                tiny,
                adapter,
                tmp_path,
                reference={"errors": errors},
                output=str(tmp_path / errors),
                train={"beta": 100.0},
                model={"gradient_checkpointing": errors == "apart"},
            )
        )
    assert all(torch.equal(weights["apart"][name], weight) for name, weight in weights["ahead"].items())
    same_log(logs["apart"], logs["ahead"], rel=0, abs=0)
    same_log(logs["together"], logs["ahead"], rel=1e-3, abs=1e-4)
    ahead, together = (torch.cat([w.flatten() for w in weights[name].values()]) for name in ("ahead", "together"))
    assert (together - ahead).norm() < 1e-3 * ahead.norm()
    assert logs["ahead"][1]["logit_abs"] > 0


@pytest.fixture
def trainer(tiny, adapter, tmp_path):
    made = Trainer(clip_config(tiny, adapter, tmp_path))
    made.add_checkpoint()
    return made


def test_training_noises_clips_on_the_linear_schedule(trainer):
    """Betas go from 0.00085 to 0.012 in equal steps, in float64; the folder's own schedule would be off by a tenth."""
    pairs = collected(trainer, 0)
    assert pairs.winners.shape == pairs.losers.shape == pairs.noise.shape == (4, 4, FRAMES, 8, 8)
    assert pairs.conditioning["prompt_embeds"].shape == (4, 16, 16)
    shown = noised(pairs, trainer.family.schedule, torch.device("cpu"))
    share = torch.from_numpy(np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))[pairs.times.numpy()])
    share = share.view(-1, 1, 1, 1, 1)
    for half, latents in zip(shown.latents.chunk(2), (pairs.winners, pairs.losers), strict=True):
        expected = share.sqrt() * latents.double() + (1 - share).sqrt() * pairs.noise.double()
        torch.testing.assert_close(half.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(shown.target, pairs.noise)


def test_a_clips_noise_is_keyed_by_its_sample_id(trainer):
    update = 1
    ids = trainer.method.rollout.maker.sample_ids(update)
    pairs = trainer.method.rollout.maker.pairs(update, ids)
    expected = keyed_noise(trainer.config.seed, "noise", [(update, sample) for sample in ids], (4, FRAMES, 8, 8))
    assert torch.equal(pairs.noise, expected)
    assert expected[0, :, 0].ne(expected[0, :, 1]).all()  # each frame has its own


def test_gradients_add_up_over_micro_batches(tiny, adapter, tmp_path):
    gradients = []
    for micro_batch in (4, 3, 1):
        trainer = Trainer(clip_config(tiny, adapter, tmp_path, train={"micro_batch": micro_batch, "beta": 50.0}))
        trainer.add_checkpoint()
        pairs = collected(trainer, 0)
        with torch.no_grad():
            for weight in trainable(trainer.policy).values():
                weight.add_(0.05)  # else every pair ties
        trainer.learner._accumulate(pairs)
        gradients.append(torch.cat([weight.grad.flatten().double() for weight in trainable(trainer.policy).values()]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


# Attention, memory, batches and compilation


def test_attention_is_found_with_its_shapes(trainer):
    inputs = trainer.family.example_inputs(16)
    layers = attention_layers(
        trainer.policy, lambda model, rows: trainer.family.denoise(model, *inputs(rows)), 2, torch.float32
    )
    found = {(shape.hidden, shape.context): len(names) for shape, names in layers.items()}
    # Within frames there are six rows; over time there is one row of three frames per place of the two clips.
    assert found == {
        ((6, 64, 16), None): 3,
        ((6, 64, 16), (6, 16, 16)): 3,
        ((128, 3, 16), None): 6,
        ((6, 16, 32), None): 1,
        ((6, 16, 32), (6, 16, 16)): 1,
        ((32, 3, 32), None): 8,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_counted_for_clips(trainer, device):
    """Twice the frames take twice the memory; on CUDA it is more, since norms are in float32."""
    one, two = (
        training_footprint(
            trainer.policy,
            trainer.family.denoise,
            inputs_of((4, frames, 16, 16), (16, 16)),
            torch.bfloat16,
            torch.device(device),
        )
        for frames in (3, 6)
    )
    assert two.per_row / one.per_row == pytest.approx(2, rel=0.05)


def test_batches_are_chosen_for_clips(tiny, adapter, tmp_path, trainer):
    config = clip_config(tiny, adapter, tmp_path, train={"micro_batch": None}, sampler={"batch": None})
    config = apply_preset(config, CPU)
    chosen = fit_to_device(config, trainer.family, trainer.processes)
    assert (chosen.train.micro_batch, chosen.sampler.batch) == (4, 32)  # all of an update; the ceiling for a CPU


@pytest.mark.parametrize("limit", [GRID_LIMIT, 50], ids=["whole", "chunks"])
def test_compiled_blocks_predict_the_same(trainer, monkeypatch, limit):
    """Blocks are traced as a whole, motion modules too, and run as traced, without a compiler."""
    trainer.policy.set_attn_processor(ChunkedAttention(AttnProcessor2_0(), limit))
    inputs = keyed_noise(0, "x", [(0,), (1,)], (4, FRAMES, 8, 8)), torch.tensor([3, 700]), embeds(torch.ones(2, 16, 16))
    with torch.no_grad():
        expected = trainer.denoiser.denoise(trainer.policy, *inputs)
        monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
        compile_blocks(trainer.policy, "sdpa", UNetFamily)
        assert torch.equal(trainer.denoiser.denoise(trainer.policy, *inputs), expected)
    blocks = [part for part in trainer.policy.modules() if isinstance(part, BasicTransformerBlock)]
    assert len(blocks) == 4 + 7 and all(block._compiled_call_impl is not None for block in blocks)


# The command line


def command(*words, cwd):
    line = [sys.executable, "-m", "seppo_fast.cli", *map(str, words)]
    line[1:3] = ["-c", "import sys; from seppo_fast.cli import main; sys.exit(main())"]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_clips_train_through_the_command_line(tiny, adapter, tmp_path):
    config = clip_config(tiny, adapter, tmp_path, log={"sample_every": 1, "sample_prompts": ["a", "b"]})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    done = command("check", tmp_path / "run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data: 5 examples, 0 bad" in done.stdout and "or 4 samples" in done.stdout
    done = command("train", tmp_path / "run.yaml", "--train.updates", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "update 1/1" in done.stdout
    entry = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert entry["aaf_rate"] == 1
    picture = np.asarray(Image.open(tmp_path / "run" / "samples" / "update-000001.png"))
    assert picture.shape == (24 + 2 * 128, 260 + 2 * FRAMES * 128, 3)
    pipe = AnimateDiffPipeline.from_pretrained(tiny, motion_adapter=MotionAdapter.from_pretrained(adapter))
    pipe.load_lora_weights(tmp_path / "run" / "weights")
    assert any("motion_modules" in name and "lora" in name for name, _ in pipe.unet.named_parameters())


def test_full_weights_train_and_load(tiny, adapter, tmp_path):
    config = clip_config(tiny, adapter, tmp_path, model={"train": "full"}, train={"updates": 1})
    weights, _ = trained(config)
    unet = AnimateDiffPipeline.from_pretrained(tmp_path / "run" / "weights").unet
    state = unet.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert any("motion_modules" in name for name in weights)


def test_full_training_goes_on_from_its_own_export(tiny, adapter, tmp_path, capsys):
    """The folder of an AnimateDiffPipeline is a model by itself: it is checked, trained, exported and judged as one."""
    first = clip_config(tiny, adapter, tmp_path, model={"train": "full"}, train={"updates": 1})
    train(first)
    assert main(["export", first.output, "--output", str(tmp_path / "export")]) == 0
    model = {"path": str(tmp_path / "export"), "motion_adapter": "", "train": "full"}
    config = clip_config(tiny, adapter, tmp_path, model=model, output=str(tmp_path / "on"))
    (tmp_path / "on.yaml").write_text(to_yaml(config))
    assert main(["check", str(tmp_path / "on.yaml")]) == 0
    trainer = Trainer(config)
    exported = load_file(tmp_path / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in trainer.policy.state_dict().items())
    assert trainer.family.scheduler_config["beta_schedule"] == "linear"
    assert trainer.cache.fingerprint == Trainer(first.model_copy(update={"output": "x"})).cache.fingerprint
    train(config)
    assert log_of(config)[0]["aaf_rate"] == 1
    assert main(["train", str(tmp_path / "on.yaml"), "--train.updates", "4"]) == 0  # and resumes
    (tmp_path / "export").rename(tmp_path / "moved")
    words = ["export", config.output, "--model", str(tmp_path / "moved"), "--output", str(tmp_path / "second")]
    assert main(words) == 0
    assert f"{FRAMES} frames" in (tmp_path / "second" / "README.md").read_text()
    assert AnimateDiffPipeline.from_pretrained(tmp_path / "second").unet.config.motion_max_seq_length == 6
    prompt = captions(held_out=True)[0]
    by_run = [judged_model(first, [prompt], 1, tmp_path / name)[0] for name in ("moved", "run/weights")]
    assert np.array_equal(*by_run)
    later = clip_config(tiny, adapter, tmp_path, model=model | {"path": str(tmp_path / "second")})
    assert not np.array_equal(judged_model(later, [prompt], 1)[0], by_run[0])
    both = clip_config(tiny, adapter, tmp_path, model={"path": str(tmp_path / "second")}, output=str(tmp_path / "both"))
    with pytest.raises(ConfigError, match="is an AnimateDiffPipeline, .* leave model.motion_adapter empty"):
        Trainer(both)
    model["path"] = str(tmp_path / "second")
    pictures = clip_config(tiny, adapter, tmp_path, model=model, data={"source": "shapes:5:3"})
    with pytest.raises(ConfigError, match="an AnimateDiffPipeline, makes clips, but data.source = .* holds pictures"):
        Trainer(pictures)


def test_a_pipeline_that_diffusers_wrote_with_its_adapter_loads(tiny, adapter, tmp_path):
    pipe = AnimateDiffPipeline.from_pretrained(tiny, motion_adapter=MotionAdapter.from_pretrained(adapter))
    pipe.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "motion_adapter").is_dir()
    model = {"path": str(tmp_path / "whole"), "motion_adapter": ""}
    trainer = Trainer(clip_config(tiny, adapter, tmp_path, model=model))
    assert trainer.family.pipe.motion_adapter is None
    state = {name.replace(".base_layer", ""): weight for name, weight in trainer.policy.state_dict().items()}
    assert all(torch.equal(state[name], weight) for name, weight in pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": "shapes:5:3"}}, "holds pictures: remove the adapter, or provide clips"),
        ({"model": {"motion_adapter": ""}, "data": {"frames": 16}}, "holds clips: set model.motion_adapter"),
        ({"model": {"temporal_attention": "triton"}}, "model.temporal_attention = triton needs"),
        ({"data": {"frames": 7}}, "data.frames = 7: this motion adapter supports at most 6 frames"),
        ({"objective": "diffusion-dpo"}, "needs two images per prompt"),
    ],
)
def test_mistakes_are_found_before_anything_starts(tiny, adapter, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(clip_config(tiny, adapter, tmp_path, **sections))
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
