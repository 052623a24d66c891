"""The memory estimate of `check` and of exit code 4 against what runs take; suggestions; estimated duration."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import seppo_fast.capacity.plan
from seppo_fast.capacity.eta import seconds_of_run
from seppo_fast.capacity.footprint import Footprint
from seppo_fast.capacity.plan import Need, _ladder, need_of, out_of_memory, suggestions
from seppo_fast.capacity.presets import MEMORY_PRESETS, apply_preset
from seppo_fast.capacity.work import forwards_per_pair
from seppo_fast.cli import main
from seppo_fast.config.load import parse_config, to_yaml
from seppo_fast.distributed.processes import processes
from seppo_fast.references.layout import PackedLayout
from seppo_fast.train.trainer import Trainer
from tests.helpers.runs import collected, tiny_config
from tests.helpers.tiny_scorers import tiny_clip
from tests.helpers.tracing import traced_peak

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[2]
KINDS = {
    "full": {"train": "full"},
    "lora, bf16": {"train": "lora", "precision": "bf16"},
    "full, recomputed": {"train": "full", "gradient_checkpointing": True},
}
# Enough pixels and rows for activations to dominate.
SIZES = {"train": {"pairs_per_update": 16, "micro_batch": 16, "updates": 4, "ema_decay": 0.9}, "sampler": {"batch": 16}}


def trainer_of(tiny, folder, kind, **sections):
    config = tiny_config(tiny, folder, model=KINDS[kind], **{**SIZES, **sections})
    return Trainer(apply_preset(config, CPU))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_takes_what_is_estimated(tiny, tmp_path, kind):
    """Within -5 and +15 %, bounds set before measuring; waiting pairs and gradient norms are not counted."""
    trainer = trainer_of(tiny, tmp_path, kind)
    need = need_of(trainer.config, trainer.family, CPU, 2**40)
    trainer.add_checkpoint()
    (pairs, more) = collected(trainer, 0), collected(trainer, 1)
    trainer.learner.step(pairs, 0)  # allocates Adam's moments, which stay
    learning = traced_peak(lambda: trainer.learner.step(more, 1), tmp_path)
    expected = need.pair.fixed + need.micro_batch * need.pair.per_row
    assert 0.95 * learning < expected < 1.15 * learning
    trainer.finished = 2
    trainer.add_checkpoint()
    sampling = traced_peak(lambda: collected(trainer, 2), tmp_path)
    # The rollout also computes the reference's errors, in the learner's micro-batches: a forward's activations.
    assert need.sample.fixed + need.batch * need.sample.per_row < 1.15 * sampling
    assert sampling < 1.05 * max(expected, need.sample.fixed + need.batch * need.sample.per_row)
    parameters = list(trainer.policy.parameters())
    states = trainer.learner.optimizer.state.values()
    moments = sum(value.nbytes for state in states for value in state.values() if value.dim())
    average = sum(value.nbytes for value in trainer.learner.ema.shadow_params)
    assert need.weights == sum(value.nbytes for value in parameters)
    assert need.trained == sum(value.nbytes for value in parameters if value.requires_grad)
    assert (need.moments, need.average) == (moments, average)


def learning_on_a_gpu(pipeline, folder, kind):
    """Returns the device, the estimated memory of learning and its measured peak; called in a separate process."""
    sizes = {"pairs_per_update": 256, "micro_batch": 256, "updates": 2, "ema_decay": 0.9}
    config = tiny_config(
        Path(pipeline), Path(folder), model=KINDS[kind], train=sizes, data={"source": "shapes:300:3", "resolution": 32}
    )
    device = processes().device
    trainer = Trainer(apply_preset(config, device))
    need = need_of(trainer.config, trainer.family, device, 2**40)
    trainer.add_checkpoint()
    pairs, more = collected(trainer, 0), collected(trainer, 1)
    trainer.learner.step(pairs, 0)
    torch.cuda.reset_peak_memory_stats()
    trainer.learner.step(more, 1)
    return {"device": device.type, "estimated": need.learning, "taken": torch.cuda.max_memory_allocated()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_gpu_takes_what_is_estimated(tiny, tmp_path, kind):
    """Within a fifth: blocks are rounded up, and convolutions may take scratch space."""
    program = (
        "import json, sys; from tests.capacity.test_estimate import *; "
        "print(json.dumps(learning_on_a_gpu(*sys.argv[1:])))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    words = [sys.executable, "-c", program, str(tiny), str(tmp_path), kind]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["device"] == "cuda"
    assert found["estimated"] == pytest.approx(found["taken"], rel=0.2)


def test_the_peaks_add_up():
    need = Need(100, 80, 120, 40, 50, Footprint(30, 7), Footprint(3, 2), micro_batch=4, batch=8, parked=False)
    assert need.learning == 100 + 160 + 50 + 30 + 28 and need.sampling == 100 + 160 + 50 + 3 + 16
    assert replace(need, parked=True).sampling == 20 + 40 + 50 + 3 + 16  # the average is never parked
    assert need.peak == 368
    assert replace(need, batch=200).peak == 313 + 400


def test_a_round_trip_takes_what_is_estimated(tiny, tmp_path):
    sampler = SIZES["sampler"] | {"round_trip": True}
    trainer = trainer_of(tiny, tmp_path, "full", sampler=sampler, data={"source": "shapes:11:3", "resolution": 64})
    need = need_of(trainer.config, trainer.family, CPU, 2**40)
    weights = sum(weight.nbytes for weight in trainer.family.pipe.vae.parameters())
    latents = torch.randn(8, 4, 32, 32)
    taken = traced_peak(lambda: trainer.denoiser.through_pixels(latents), tmp_path)
    assert 0.9 * taken < need.round_trip - weights < 1.1 * taken
    assert need.sampling == max(need.round_trip, need.sample.fixed + 16 * need.sample.per_row) + (
        need.weights + need.moments + need.average + need.references
    )
    assert any("or their pixels" in line for line in need.table())
    without = need_of(trainer_of(tiny, tmp_path, "full").config, trainer.family, CPU, 2**40)
    assert without.round_trip == 0 and not any("or their pixels" in line for line in without.table())


def test_a_round_trip_is_part_of_the_eta(tiny, tmp_path, monkeypatch):
    """One round trip per sample, however often it is used; here a forward takes 1 second and a round trip 1000."""
    trainer = trainer_of(tiny, tmp_path, "full", sampler=SIZES["sampler"] | {"round_trip": True}, reference={"uses": 4})
    need = need_of(trainer.config, trainer.family, CPU, 2**40)
    trips = []
    monkeypatch.setattr(trainer.denoiser, "through_pixels", lambda latents: trips.append(len(latents)))
    monkeypatch.setattr(trainer.denoiser, "denoise", lambda model, latents, *_: latents)

    def seconds(call):
        before = len(trips)
        call()
        return 1000.0 * trips[-1] if len(trips) > before else 1.0

    monkeypatch.setattr("seppo_fast.capacity.eta._seconds", seconds)
    pairs = 16 * 4
    expected = pairs * (forwards_per_pair(trainer.config) + 1000 / 4)
    assert seconds_of_run(trainer.config, need, trainer.family, trainer.denoiser) == pytest.approx(expected)
    assert trips == [1]


def judged(judge, folder=None):
    return {"objective": "seppo-judged", "reference": {"judge": judge, "judge_weights": folder, "uses": 2}}


def test_the_judge_is_part_of_what_a_run_takes(tiny, tmp_path):
    weights = load_file(tiny_clip(tmp_path / "scorers" / "clip") / "model.safetensors")
    numbers = sum(tensor.numel() for tensor in weights.values())
    trainer = trainer_of(tiny, tmp_path, "full", **judged("brightness"))
    config = trainer_of(tiny, tmp_path, "full", **judged("clip", str(tmp_path / "scorers"))).config
    for device, each in ((CPU, 4), (torch.device("cuda"), 2)):  # float16 on a GPU
        function, network = (need_of(c, trainer.family, device, 2**40) for c in (trainer.config, config))
        assert (function.judge, network.judge) == (0, each * numbers)
        assert network.learning - function.learning == network.sampling - function.sampling == each * numbers
        assert any(line.startswith("  judge  ") for line in network.table())
        assert not any("judge" in line for line in function.table())
    found = list(suggestions(config, trainer.family, CPU, 2**40, network.peak))
    assert found and all(need.judge == 4 * numbers for _, need in found)
    tree = config.model_dump(mode="json")
    tree["sampler"]["batch"] = None
    eight = replace(need_of(config, trainer.family, CPU, 2**40), batch=8)
    for spare, batch in ((0, 8), (-1, 4)):
        assert need_of(parse_config(tree), trainer.family, CPU, 2**40, eight.sampling + spare).batch == batch


@pytest.mark.parametrize("judge", ["clip", "brightness"])
def test_check_says_what_it_counts_of_the_judge(tiny, tmp_path, capsys, judge):
    tiny_clip(tmp_path / "scorers" / "clip")
    (tmp_path / "run.yaml").write_text(to_yaml(tiny_config(tiny, tmp_path, **judged(judge, str(tmp_path / "scorers")))))
    assert main(["check", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    counted = "its weights are in the table, but " if judge == "clip" else ""
    assert f"reference.judge: {counted}the memory and time of its scoring are not estimated" in said
    assert ("weights of reference.judge" in said) == (judge == "clip")
    assert "or their pixels" in said


def test_a_judge_has_samples_and_winners_decoded(tiny, tmp_path, monkeypatch):
    """In one batch. Here a forward takes 1 second and decoding 1000 a row, of which a sample used twice needs two."""
    trainer = trainer_of(
        tiny, tmp_path, "full", **judged("brightness"), data={"source": "shapes:11:3", "resolution": 64}
    )
    need = need_of(trainer.config, trainer.family, CPU, 2**40)
    weights = sum(weight.nbytes for weight in trainer.family.pipe.vae.parameters())
    taken = traced_peak(lambda: trainer.family.decode(torch.randn(16, 4, 32, 32)), tmp_path)
    assert 0.9 * taken < need.round_trip - weights < 1.25 * taken
    decoded, parked = [], []
    monkeypatch.setattr(trainer.family, "decode", lambda latents: decoded.append(len(latents)))
    monkeypatch.setattr(trainer.family, "park_encoders", lambda: parked.append(1))
    monkeypatch.setattr(trainer.denoiser, "denoise", lambda model, latents, *_: latents)

    def seconds(call):
        before = len(decoded)
        call()
        return 1000.0 * decoded[-1] if len(decoded) > before else 1.0

    monkeypatch.setattr("seppo_fast.capacity.eta._seconds", seconds)
    expected = 16 * 4 * (forwards_per_pair(trainer.config) + 2 * 1000 / 2)
    assert seconds_of_run(trainer.config, need, trainer.family, trainer.denoiser) == pytest.approx(expected)
    assert decoded == [1] and parked


def test_open_batches_are_the_largest_that_fit(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, "full")
    tree = trainer.config.model_dump(mode="json")
    tree["train"]["micro_batch"] = tree["sampler"]["batch"] = None
    config = parse_config(tree)
    full = need_of(config, trainer.family, CPU, 2**40)
    assert (full.micro_batch, full.batch) == (16, 32)  # the preset's limit, which is all pairs; a CPU's limit
    for rows in (1, 2, 8):
        for spare, fitting in ((0, rows), (-1, max(1, rows // 2))):
            most = replace(full, micro_batch=rows).learning + spare
            assert need_of(config, trainer.family, CPU, 2**40, most).micro_batch == fitting
            most = replace(full, batch=rows).sampling + spare
            assert need_of(config, trainer.family, CPU, 2**40, most).batch == fitting


def test_suggestions_fit_and_the_mildest_comes_first(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, "full")
    need = need_of(trainer.config, trainer.family, CPU, 2**40)
    found = list(suggestions(trainer.config, trainer.family, CPU, 2**40, int(0.8 * need.peak)))
    batches, recomputed, on_disk = (changes for changes, _ in found)
    assert batches.keys() <= {"train.micro_batch", "sampler.batch"} and batches["train.micro_batch"] < 16
    assert recomputed["model.gradient_checkpointing"] is True and "reference.park" not in recomputed  # CPU: no effect
    assert on_disk["reference.host_gib"] == 0 and "model.train" not in on_disk
    assert all(lighter.peak <= 0.8 * need.peak for _, lighter in found)
    tree = trainer.config.model_dump(mode="json")
    for key, value in recomputed.items():
        section, name = key.split(".")
        tree[section][name] = value
    assert need_of(parse_config(tree), trainer.family, CPU, 2**40).peak == found[1][1].peak  # as if a user set it


def test_what_stays_open_on_a_gpu_is_chosen_as_the_dial_does(tiny, tmp_path):
    """Counted without a GPU: past policies get a share of free memory; Adam's state is parked if few samples fit."""
    trainer = trainer_of(tiny, tmp_path, "full")
    tree = trainer.config.model_dump(mode="json")
    tree["reference"]["park"] = tree["sampler"]["batch"] = tree["reference"]["gpu_gib"] = None
    config, cuda = parse_config(tree), torch.device("cuda")
    slab = PackedLayout.of(trainer.policy).size
    full = need_of(config, trainer.family, cuda, 2**40)
    assert not full.parked and full.references == (2 + 1) * slab and full.batch == MEMORY_PRESETS["balanced"].batch
    few = replace(full, batch=15).sampling
    tight = need_of(config, trainer.family, cuda, 2**40, few)
    assert tight.parked and tight.batch > 8 and tight.sampling <= few
    assert not need_of(config, trainer.family, cuda, 2**40, replace(full, batch=16).sampling).parked
    # 15 % of free memory holds one of the two past policies; the others are the resident and a prefetched one.
    room = full.weights + int(1.5 * slab / 0.15)
    assert need_of(config, trainer.family, cuda, room).references == (1 + 1 + 1) * slab


def test_a_full_host_beside_a_gpu_gets_no_table_of_the_gpu(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, "full")
    cuda = torch.device("cuda")
    said = str(out_of_memory(trainer.config, trainer.family, cuda, RuntimeError("can't allocate memory: 2 GiB")))
    assert said.startswith("out of host memory (not GPU memory): can't allocate memory: 2 GiB") and "\n" not in said


def test_a_run_with_states_is_not_told_to_become_another(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, "full")
    (tmp_path / "run" / "state" / "update-000001").mkdir(parents=True)
    found = list(suggestions(trainer.config, trainer.family, CPU, 2**40, 1))
    assert found == [] and all("model.train" not in changes for changes in _ladder(trainer.config, CPU))
    shutil.rmtree(tmp_path / "run")
    assert any("model.train" in changes for changes in _ladder(trainer.config, CPU))


def test_where_nothing_fits_it_says_so(tiny, tmp_path, monkeypatch):
    trainer = trainer_of(tiny, tmp_path, "full")
    monkeypatch.setattr(seppo_fast.capacity.plan, "room_on", lambda device: 1)
    assert "(smaller batches, recomputation and others) would be enough" in str(
        out_of_memory(trainer.config, trainer.family, CPU, MemoryError("no"))
    )


def test_the_error_holds_the_table(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, "full")
    said = str(out_of_memory(trainer.config, trainer.family, CPU, MemoryError("no")))
    assert "out of memory: no" in said and "16 pairs" in said and said.count("\n  --") == 3


def test_out_of_memory_exits_4_with_the_table_and_three_settings(tiny, tmp_path, forks):
    config = tiny_config(tiny, tmp_path, **SIZES)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    ended = forks.run("train", tmp_path / "run.yaml", fault="micro-batch@2=memory")
    assert ended.code == 4, ended.err
    assert "out of memory: fault micro-batch" in ended.err and "Traceback" not in ended.err
    lines = ended.err.splitlines()
    suggested = lines[lines.index("settings that would fit:") + 1 :]
    assert len(suggested) == 3
    assert forks.run("train", tmp_path / "run.yaml", *suggested[0].partition(":")[0].split()).code == 0


def rewarded(objective, rl=None, train=None, sampler=None, reference=None):
    """Returns settings of an objective that learns from the brightness of samples, of which no two have the same."""
    train = SIZES["train"] | {"micro_batch": 64} | (train or {})
    sampler = {"steps": 4, "guidance": 2.0, "batch": 16} | (sampler or {})
    reward = {"reward": "brightness"} | (rl or {})
    data = {"prompt_dropout": 0.0}
    return {"objective": objective, "rl": reward, "train": train, "sampler": sampler, "data": data} | (
        {"reference": reference} if reference else {}
    )


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"sampler": {"guidance": 1.0, "steps": 3, "batch": 16}, "reference": {"uses": 2}},
        {"objective": "sft"},
        {"model": {"gradient_checkpointing": True}},
        {"objective": "kto", "data": {"source": "shapes-made:20"}},
        rewarded("ddpo", rl={"steps": 0.5}),
        rewarded("grpo", rl={"kl": 0.1, "window": (1, 3)}, sampler={"guidance": 1.0}),
        rewarded("nft", rl={"samples_per_prompt": 4, "kl": 0.1}, reference={"uses": 2}),
        rewarded("d3po", train={"beta": 1.0}),
        rewarded("spo", rl={"gap": 0.0, "plain_steps": 1, "candidates": 3}, train={"beta": 1.0}),
    ],
    ids=["seppo", "unguided, two uses", "sft", "recomputed", "kto", "ddpo", "grpo", "nft", "d3po", "spo"],
)
def test_the_rows_that_the_eta_goes_by_are_those_that_run(tiny, tmp_path, sections):
    """The rows of an iteration that pass through the UNet are counted by hooks on a convolution."""
    # One of the two updates measures winners' and losers' gradients; without losers, the attempt would add a forward.
    every = 0 if "objective" in sections else 2
    config = tiny_config(tiny, tmp_path, **SIZES | sections, log={"health_every": every})
    trainer = Trainer(apply_preset(config, CPU))
    rows = {"forward": 0, "backward": 0}

    def forward(module, args, output):
        rows["forward"] += len(output)

    def backward(module, inputs, outputs):
        rows["backward"] += len(outputs[0])

    last = trainer.policy.up_blocks[-1].resnets[-1].conv1  # inside a recomputed block
    last.register_forward_hook(forward)
    last.register_full_backward_hook(backward)
    trainer.add_checkpoint()
    for update in range(2):
        trainer.learner.step(collected(trainer, update), update)
    assert rows["forward"] + 2 * rows["backward"] == forwards_per_pair(trainer.config) * 2 * 16


@pytest.mark.parametrize(("errors", "models"), [("ahead", 1), ("apart", 2)])
def test_the_offset_of_kto_is_part_of_the_eta(tiny, tmp_path, errors, models):
    """Of at most 64 rows per update. The rest is the policy's forward and backward, and the reference's forward."""
    for pairs, share in ((16, 1.0), (64, 1.0), (256, 0.25)):
        train = {"pairs_per_update": pairs}
        config = tiny_config(tiny, tmp_path, objective="kto", train=train, reference={"errors": errors})
        assert forwards_per_pair(apply_preset(config, CPU)) == 4 + models * share
