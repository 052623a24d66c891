"""What objectives with a reward take: forwards, decoded samples, memory of a micro-batch, latents in host memory."""

import json
import math
import re
import shutil

import pytest
import torch

from seppo_fast.capacity.batches import BatchRoom
from seppo_fast.capacity.footprint import Footprint
from seppo_fast.capacity.plan import need_of
from seppo_fast.capacity.presets import apply_preset
from seppo_fast.capacity.work import (
    decodes_per_pair,
    forwards,
    forwards_per_pair,
    iteration_samples,
    latents_per_sample,
    network_rows,
    row_latents,
    rows_per_update,
)
from seppo_fast.cli import main
from seppo_fast.commands.check import _rewarded
from seppo_fast.config.load import read_config, to_yaml
from seppo_fast.train.trainer import Trainer
from tests.helpers.runs import collected, tiny_config
from tests.helpers.tiny_scorers import tiny_clip
from tests.helpers.tracing import traced_peak

CPU = torch.device("cpu")
N = 4 * 8 * 8  # numbers of a latent of the tiny pipeline


def rewarded(tiny, folder, objective, **sections):
    """Returns a run of two updates per iteration, rewarded by brightness, which no two samples have in common."""
    tree = {
        "train": {"pairs_per_update": 16, "updates": 4, "micro_batch": 16},
        "sampler": {"steps": 4, "guidance": 2.0, "batch": 16},
        "data": {"prompt_dropout": 0.0},
        "rl": {"reward": "brightness"},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return apply_preset(tiny_config(tiny, folder, objective=objective, **tree), CPU)


def test_the_published_settings_cost_what_their_formulas_say():
    """Rows of the UNet; a trained one counts three. With checkpointing off, which the presets would choose."""
    recipes = {name: read_config(f"{name}.yaml") for name in ("ddpo", "grpo", "nft", "d3po", "spo")}
    assert forwards_per_pair(recipes["ddpo"]) == 2 * 50 + 0.5 * 2 * 50 + 6 * 50
    assert forwards_per_pair(recipes["grpo"]) == forwards_per_pair(recipes["ddpo"])
    assert 9 * forwards_per_pair(recipes["nft"]) == pytest.approx(10 + 9 * (3 + 1))
    assert 2 * forwards_per_pair(recipes["d3po"]) == 2 * (2 * 20 + 6 * 20 + 2 * 20)
    assert forwards_per_pair(recipes["spo"]) == 130 + 16 * (6 + 2)
    assert forwards(recipes["spo"]).trained == 16 * 2 and decodes_per_pair(recipes["spo"]) == 64
    rows = {name: (network_rows(config), rows_per_update(config)) for name, config in recipes.items()}
    assert rows == {"ddpo": (2, 6400), "grpo": (2, 12800), "nft": (1, 10368), "d3po": (4, 20), "spo": (2, 64)}
    counts = {name: (iteration_samples(config), latents_per_sample(config)) for name, config in recipes.items()}
    assert counts == {"ddpo": (256, 51), "grpo": (512, 51), "nft": (1152, 1), "d3po": (40, 21), "spo": (40, 48)}


@pytest.mark.parametrize(("objective", "each"), [("d3po", 4), ("nft", 1)])
def test_a_micro_batch_takes_what_is_estimated(tiny, tmp_path, objective, each):
    """Within -5 and +15 %, as for pairs. DiffusionNFT's micro-batches have as many latents, without guidance."""
    config = rewarded(tiny, tmp_path, objective, train={"beta": 1.0}, sampler={"steps": 2})
    trainer = Trainer(config)
    need = need_of(trainer.config, trainer.family, CPU, 2**40)
    assert network_rows(config) == each
    trainer.add_checkpoint()
    batch, more = collected(trainer, 0), collected(trainer, 1)
    trainer.learner.step(batch, 0)  # allocates Adam's moments, which stay
    learning = traced_peak(lambda: trainer.learner.step(more, 1), tmp_path)
    expected = need.pair.fixed + need.micro_batch * need.pair.per_row
    assert 0.95 * learning < expected < 1.15 * learning
    assert any(line.startswith("  16 rows") for line in need.table())


@pytest.mark.parametrize(("pairs", "world", "fitting"), [(2, 1, 8), (8, 1, 16), (8, 4, 8)])
def test_a_micro_batch_has_at_most_the_rows_of_an_update(tiny, tmp_path, pairs, world, fitting):
    """Two samples with ten steps are ten rows, of which the largest power of two is taken; the preset allows 16."""
    config = rewarded(tiny, tmp_path, "d3po", train={"pairs_per_update": pairs, "beta": 1.0}, sampler={"steps": 10})
    room = BatchRoom(budget=1000, moments=0, average=0, references=0, cpu=False, world=world)
    assert rows_per_update(config) == 5 * pairs
    assert room.micro_batch(config, Footprint(0, 1)) == fitting


@pytest.mark.parametrize(
    ("objective", "sections"),
    [
        ("ddpo", {}),
        ("nft", {"reference": {"uses": 2}, "rl": {"samples_per_prompt": 4}}),
        ("spo", {"rl": {"gap": 0.0, "plain_steps": 1, "candidates": 3}, "train": {"beta": 1.0}}),
    ],
)
def test_the_decoded_samples_that_the_eta_goes_by_are_those_that_run(tiny, tmp_path, monkeypatch, objective, sections):
    config = rewarded(tiny, tmp_path, objective, **sections)
    trainer, decoded = Trainer(config), []
    decode = trainer.family.decode
    monkeypatch.setattr(trainer.family, "decode", lambda latents: decoded.append(len(latents)) or decode(latents))
    trainer.add_checkpoint()
    collected(trainer, 0)
    assert sum(decoded) == 2 * 16 * decodes_per_pair(config)


@pytest.mark.parametrize("objective", ["grpo", "spo", "nft"])
def test_host_memory_holds_the_latents_that_are_counted(tiny, tmp_path, objective):
    kl = {} if objective == "spo" else {"kl": 0.1}
    rl = kl | ({"gap": 0.0, "plain_steps": 1} if objective == "spo" else {})
    config = rewarded(tiny, tmp_path, objective, rl=rl, train={"beta": 1.0})
    trainer = Trainer(config)
    trainer.add_checkpoint()
    batches = [collected(trainer, update) for update in range(2)]
    if objective == "nft":
        assert batches[0].samples.data_ptr() == batches[1].samples.data_ptr()
        kept = [x for batch in batches for x in (batch.old, batch.initial) if x is not None]
    else:
        assert batches[0].store.data_ptr() == batches[1].store.data_ptr()  # one buffer for all updates
        assert batches[0].store.numel() == N * latents_per_sample(config) * iteration_samples(config)
        kept = [batch.reference for batch in batches if batch.reference is not None]
    assert sum(tensor.numel() for tensor in kept) == N * row_latents(config)


def test_check_says_what_is_trained_and_counted(tiny, tmp_path, capsys):
    tiny_clip(tmp_path / "scorers" / "clip")
    rl = {"reward": "clip", "reward_weights": str(tmp_path / "scorers"), "kl": 0.1}
    (tmp_path / "run.yaml").write_text(to_yaml(rewarded(tiny, tmp_path, "grpo", rl=rl)))
    assert main(["check", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    assert "an update: 16 samples (2 prompts, 8 each), 64 rows; an iteration: 32 samples, made before its 2" in said
    assert "\nsteps: 4, 4 of them random; 4 trained per sample\n" in said
    assert f"\nrl.clip: {1e-4 * math.sqrt(16384 / N):.3g}, by the rule 1e-4 sqrt(16384 / N)" in said
    assert re.search(r"\n  reward +[\d.]+ MiB  weights of rl.reward = clip\n", said)
    assert "\nrl.reward: its weights are in the table, but the memory and time" in said
    latents = 4 * N / 2**20
    assert f"\nhost memory: {32 * 5 * latents:.1f} MiB for an iteration's samples (latents per sample: 5)" in said
    assert f"; {32 * 4 * latents:.1f} MiB for rows and predictions\n" in said
    assert "alphas_cumprod" not in said and "rl.prompt_count" not in said


def test_check_says_when_ddpo_has_no_statistics_per_prompt(tiny, tmp_path):
    """4 updates of 16 samples; a prompt needs 16."""
    config = rewarded(tiny, tmp_path, "ddpo")
    count, few = _rewarded(config, 8)
    assert count.startswith("an update: 16 samples (16 prompts, 1 each), 64 rows")
    assert few.startswith("the run samples each of 8 prompts 8 times, less often than rl.prompt_count = 16")
    assert len(list(_rewarded(config, 4))) == 1
    assert len(list(_rewarded(rewarded(tiny, tmp_path, "grpo"), 8))) == 1


def test_check_refuses_a_scheduler_that_clips(tiny, tmp_path, capsys):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(tiny, pipeline)
    file = pipeline / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"thresholding": True}))
    (tmp_path / "run.yaml").write_text(to_yaml(rewarded(pipeline, tmp_path, "grpo")))
    assert main(["check", str(tmp_path / "run.yaml")]) == 2
    assert "set thresholding to false in scheduler_config.json" in capsys.readouterr().err
