"""Methods that learn from labels in the data, end to end: what they compute, that they resume, what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from seppo_fast.capacity.batches import BatchRoom
from seppo_fast.capacity.footprint import Footprint
from seppo_fast.config.load import to_yaml
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.loss import denoising_errors
from seppo_fast.methods.labelled import kto
from seppo_fast.methods.pairs import noised
from seppo_fast.methods.preference import step_loss
from seppo_fast.runs.checkpoint import newest_state
from seppo_fast.train import train as run
from seppo_fast.train.preflight import preflight
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError, DataError
from tests.helpers.runs import collected, log_of, tiny_config
from tests.helpers.same_run import assert_same_run


class Ended(Exception):
    """Ends a run from outside."""


def mapo_config(tiny, tmp_path, **sections):
    sections["train"] = {"beta": 0.1, "learning_rate": 1e-4} | sections.get("train", {})
    sections["data"] = {"source": "shapes-made:20"} | sections.get("data", {})
    return tiny_config(tiny, tmp_path, objective="mapo", **sections)


@pytest.mark.parametrize("share_noise", [True, False])
def test_a_micro_batch_of_mapo_by_autograd(tiny, tmp_path, share_noise):
    trainer = Trainer(mapo_config(tiny, tmp_path, train={"share_noise": share_noise, "micro_batch": 6}))
    assert trainer.references is None
    pairs = collected(trainer, 0)
    assert pairs.losers is not None and pairs.ref_error is None and len(pairs.noise) == (6 if share_noise else 12)
    step = trainer.method.loss(trainer.policy, pairs, torch.tensor(3.0))
    assert step.output.shape == step.grad.shape == (12, 4, 8, 8) and step.halves == 2

    prediction = step.output.detach().double().requires_grad_()
    target = noised(pairs, trainer.family.schedule, trainer.denoiser.device).target.double()
    errors = (prediction - target.repeat(12 // len(target), 1, 1, 1)).square().flatten(1).mean(1)
    winner, loser = errors.chunk(2)
    ratios = [0.5 * m / torch.expm1(0.5 * m) for m in (winner, loser)]
    logit = 1000 * (ratios[0] - ratios[1])
    loss = (winner - 0.1 * F.logsigmoid(logit)).mean()
    (expected,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(step.grad.double(), 3 * expected, rtol=1e-3, atol=1e-6)
    assert step.sums["loss"].item() == pytest.approx(6 * loss.item(), rel=1e-4)
    assert step.sums["correct"] == (logit > 0).sum() and step.sums["saturated"] == (logit.abs() > 10).sum()


def test_mapo_trains_and_resumes_bit_for_bit(tiny, tmp_path):
    straight = mapo_config(tiny, tmp_path, save={"minutes": 0}, log={"health_every": 2})
    run(straight)
    log = log_of(straight)
    assert [entry["update"] for entry in log] == [1, 2, 3]
    assert all(entry["grad_norm"] > 0 and 0 <= entry["correct"] <= 1 for entry in log)
    assert {"winner_error", "loser_error", "ratio_margin", "margin_loss", "saturated"} <= log[0].keys()
    assert log[0]["loss"] == pytest.approx(log[0]["winner_error"] + log[0]["margin_loss"], rel=1e-5)
    assert log[0]["loser_grad_norm"] > 0 and log[0].get("ref_winner_error") is None

    def end(trainer, updates):
        if updates == 1:
            trainer.saver.wait()
            raise Ended

    broken = straight.model_copy(update={"output": str(tmp_path / "broken")})
    with pytest.raises(Ended):
        run(broken, end)
    assert newest_state(Path(broken.output)).update == 1
    run(broken)
    assert_same_run(straight, broken)


def test_the_micro_batch_does_not_change_what_mapo_learns(tiny, tmp_path):
    """The first update's gradient; later ones follow rounding, which Adam amplifies."""
    logs = []
    for size in (6, 4):
        train = {"micro_batch": size, "updates": 1}
        config = mapo_config(tiny, tmp_path, output=str(tmp_path / str(size)), train=train)
        run(config)
        logs.append(log_of(config)[0])
    for name in ("loss", "winner_error", "loser_error", "ratio_margin", "saturated", "grad_norm"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-5, abs=1e-7), name


def test_mapo_needs_pairs(tiny, tmp_path):
    with pytest.raises(ConfigError, match="objective 'mapo' needs two images per prompt"):
        run(mapo_config(tiny, tmp_path, data={"source": "shapes:11:3"}))


def rpo_config(tiny, tmp_path, block=2, temperature=0.05, **sections):
    sections["train"] = {"beta": 500.0, "learning_rate": 1e-4} | sections.get("train", {})
    sections["data"] = {"source": "shapes-made:20"} | sections.get("data", {})
    rpo = {"block": block, "temperature": temperature}
    return tiny_config(tiny, tmp_path, objective="diffusion-rpo", rpo=rpo, **sections)


def moved_on(trainer):
    """Returns the first update's pairs after a small change of the policy."""
    trainer.add_checkpoint()
    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight.mul_(1.001)
    return collected(trainer, 0)


@pytest.mark.parametrize(("block", "errors"), [(3, "ahead"), (2, "apart"), (6, "ahead")])
def test_a_micro_batch_of_rpo_by_autograd(tiny, tmp_path, block, errors):
    trainer = Trainer(
        rpo_config(tiny, tmp_path, block, 0.5, train={"micro_batch": 6}, reference={"errors": errors})
    )  # fmt: skip
    pairs = moved_on(trainer)
    step = trainer.method.loss(trainer.policy, pairs, torch.tensor(3.0))
    assert step.output.shape == step.grad.shape == (12, 4, 8, 8) and step.halves == 2

    examples = [sample % len(trainer.cache) for sample in pairs.sample_ids]
    embeds = trainer.cache.conditioning(examples)["prompt_embeds"].double().mean(1)
    prediction = step.output.detach().double().requires_grad_()
    target = noised(pairs, trainer.family.schedule, trainer.denoiser.device).target.double()
    reference = trainer.method.strategy.predictions(trainer.policy, pairs).ref_error.double()
    winner, loser = ((prediction - target.repeat(2, 1, 1, 1)).square().flatten(1).mean(1) - reference).chunk(2)
    terms, own = [], []
    for first in range(0, 6, block):
        rows = range(first, first + block)
        for i in rows:
            closeness = torch.stack([F.cosine_similarity(embeds[i], embeds[j], dim=0) / 0.5 for j in rows])
            omega = closeness.exp() / closeness.exp().sum()
            own.append(omega[i - first])
            terms += [-F.logsigmoid(-250 * omega[j - first] * (winner[i] - loser[j])) for j in rows]
    loss = torch.stack(terms).mean()
    (expected,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(step.grad.double(), 3 * expected, rtol=1e-2, atol=1e-4 * expected.abs().max())
    assert step.sums["loss"].item() == pytest.approx(6 * loss.item(), rel=1e-4)
    assert step.sums["correct"] == (winner < loser).sum()
    assert step.sums["diagonal_weight"].item() == pytest.approx(sum(own).item(), rel=1e-5) and max(own) < 0.9
    errors = {name: step.sums[name].item() for name in ("winner_error", "ref_winner_error", "ref_loser_error")}
    assert errors["winner_error"] - errors["ref_winner_error"] == pytest.approx(winner.sum().item(), abs=1e-5)
    assert errors["ref_loser_error"] == pytest.approx(reference[6:].sum().item(), rel=1e-5)


def test_rpo_with_blocks_of_one_pair_is_diffusion_dpo(tiny, tmp_path):
    """The same pairs, values and gradients; the means are summed in another order."""
    steps = []
    for config in (
        rpo_config(tiny, tmp_path, block=1),
        tiny_config(
            tiny, tmp_path, objective="diffusion-dpo", train={"beta": 500.0}, data={"source": "shapes-made:20"}
        ),
    ):
        trainer = Trainer(config)
        pairs = moved_on(trainer)
        steps.append([trainer.method.loss(trainer.policy, p, torch.tensor(3.0)) for p in pairs.micro_batches(4)])
    for ours, dpo in zip(*steps, strict=True):
        assert torch.equal(ours.output, dpo.output)
        torch.testing.assert_close(ours.grad, dpo.grad, rtol=1e-5, atol=1e-9)
        for name in ("loss", "correct", "winner_error", "loser_error", "ref_winner_error", "ref_loser_error"):
            torch.testing.assert_close(ours.sums[name], dpo.sums[name], rtol=1e-6, atol=0)
        assert ours.sums["diagonal_weight"] == len(ours.grad) / 2


def test_rpo_at_a_low_temperature_and_with_equal_embeddings(tiny, tmp_path, monkeypatch):
    """Weights of 1 for distinct prompts: Diffusion-DPO's gradient / B. Of 1/B for equal ones: all B^2 pairs alike."""
    trainer = Trainer(rpo_config(tiny, tmp_path, 6, 1e-3, train={"micro_batch": 6}))
    pairs = moved_on(trainer)
    monkeypatch.setattr(trainer.method, "_prompt_embeds", lambda sample_ids: torch.eye(6))
    made = trainer.method.strategy.predictions(trainer.policy, pairs)
    alone = step_loss(
        OBJECTIVES["diffusion-dpo"], made.policy, made.target, made.ref_error, beta=500.0, tie_tol=0.0,
        grad_scale=1.0, backend="torch",
    )  # fmt: skip
    step = trainer.method.loss(trainer.policy, pairs, torch.tensor(1.0))
    torch.testing.assert_close(step.grad, alone.grad / 6, rtol=1e-4, atol=1e-9)
    expected = (alone.sums["loss"].item() + 30 * np.log(2)) / 6
    assert step.sums["loss"].item() == pytest.approx(expected, rel=1e-6) and step.sums["diagonal_weight"] == 6

    monkeypatch.setattr(trainer.method, "_prompt_embeds", lambda sample_ids: torch.ones(6, 3))
    step = trainer.method.loss(trainer.policy, pairs, torch.tensor(1.0))
    difference = denoising_errors(made.policy.detach(), made.target).double() - made.ref_error.double()
    winner, loser = difference.chunk(2)
    every = F.softplus(250 / 6 * (winner[:, None] - loser[None, :]))
    assert step.sums["loss"].item() == pytest.approx(every.mean().item() * 6, rel=1e-5)
    assert step.sums["diagonal_weight"].item() == pytest.approx(1.0, rel=1e-6)


def test_rpo_trains_and_resumes_bit_for_bit(tiny, tmp_path):
    straight = rpo_config(tiny, tmp_path, save={"minutes": 0}, log={"health_every": 2})
    run(straight)
    log = log_of(straight)
    assert [entry["update"] for entry in log] == [1, 2, 3]
    assert log[0]["loss"] == pytest.approx(np.log(2), rel=1e-6) and log[0]["winner_error"] == log[0]["ref_winner_error"]
    assert log[1]["loss"] != log[0]["loss"] and all(0.5 <= entry["diagonal_weight"] <= 1 for entry in log)
    assert log[0]["loser_grad_norm"] > 0 and all(entry["grad_norm"] > 0 for entry in log)

    def end(trainer, updates):
        if updates == 1:
            trainer.saver.wait()
            raise Ended

    broken = straight.model_copy(update={"output": str(tmp_path / "broken")})
    with pytest.raises(Ended):
        run(broken, end)
    run(broken)
    assert_same_run(straight, broken)


def test_two_processes_learn_rpo_as_one(tiny, tmp_path, ranks):
    """Three blocks of 2 pairs, of which two processes have 2 and 1."""
    config = rpo_config(tiny, tmp_path, train={"micro_batch": 2, "updates": 2, "learning_rate": 1e-5})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    logs = []
    for world in (1, 2):
        output = str(tmp_path / f"world{world}")
        ends = ranks.run(world, "train", tmp_path / "run.yaml", "--output", output)
        assert [end.code for end in ends] == [0] * world, ends[0].out
        logs.append(log_of(config.model_copy(update={"output": output})))
    for update, tolerance in enumerate((1e-5, 1e-2)):
        for name in ("loss", "diagonal_weight", "winner_error", "loser_error", "grad_norm"):
            assert logs[0][update][name] == pytest.approx(logs[1][update][name], rel=tolerance), name


def test_micro_batches_of_rpo_hold_whole_blocks(tiny, tmp_path):
    """Also those that are chosen by memory: the preset allows 1 pair, and 16."""
    room = BatchRoom(budget=1000, moments=0, average=0, references=0, cpu=False)
    train = {"micro_batch": None, "pairs_per_update": 21}
    for memory, fits, size in (("low", 100, 7), ("balanced", 100, 14), ("balanced", 13, 7), ("balanced", 3, 7)):
        config = rpo_config(tiny, tmp_path, 7, memory=memory, train=train)
        assert room.micro_batch(config, Footprint(0, 1000 // fits)) == size
    few = ranks_refused(rpo_config(tiny, tmp_path, 3, train={"micro_batch": 6}), 3)
    assert "rpo.block = 3 leave fewer blocks per update than there are processes (3)" in few


def ranks_refused(config, processes):
    with pytest.raises(ConfigError) as error:
        preflight(config, torch.device("cpu"), processes)
    return str(error.value)


def kto_config(tiny, tmp_path, **sections):
    sections["train"] = {"beta": 1000.0, "learning_rate": 1e-4} | sections.get("train", {})
    sections["data"] = {"source": "shapes-made:20"} | sections.get("data", {})
    return tiny_config(tiny, tmp_path, objective="kto", **sections)


@pytest.mark.parametrize("errors", ["ahead", "apart"])
@pytest.mark.parametrize("rows", [64, 4])
def test_an_update_of_kto_by_autograd(tiny, tmp_path, monkeypatch, errors, rows):
    """Micro-batches of 4 and 2 rows, and an offset over all rows or over the first four."""
    monkeypatch.setattr(kto, "OFFSET_ROWS", rows)
    trainer = Trainer(kto_config(tiny, tmp_path, reference={"errors": errors}))
    trainer.add_checkpoint()
    pairs = collected(trainer, 0)
    assert pairs.losers is None and len(pairs) == len(pairs.labels) == 6 and 0 < pairs.labels.sum() < 6
    if errors == "ahead":
        assert pairs.ref_error.shape == (6,)

    parts = list(pairs.micro_batches(4))
    at_start = [trainer.method.loss(trainer.policy, part, torch.tensor(1.0)) for part in parts]
    assert all(step.sums["offset"] == 0 for step in at_start)
    assert sum(step.sums["loss"] for step in at_start) == 3.0  # 1 - sigmoid(0) for each of 6 rows

    with torch.no_grad():
        for weight in trainer.policy.parameters():
            weight.mul_(1.001)
    pairs = collected(trainer, 0)
    parts = list(pairs.micro_batches(4))
    steps = [trainer.method.loss(trainer.policy, part, torch.tensor(3.0)) for part in parts]
    reference = [trainer.method.strategy.predictions(trainer.policy, part).ref_error.double() for part in parts]
    predictions = [step.output.detach().double().requires_grad_() for step in steps]
    targets = [noised(part, trainer.family.schedule, trainer.denoiser.device).target.double() for part in parts]
    errors = [(p - t).square().flatten(1).mean(1) for p, t in zip(predictions, targets, strict=True)]
    gains = torch.cat([r - e for r, e in zip(reference, errors, strict=True)])
    offset = gains[:rows].mean().clamp(min=0).detach()
    sign = pairs.labels.double() * 2 - 1
    losses = 1 - torch.sigmoid(sign * 1000 * (gains - offset))
    assert 0.01 < losses.min() and losses.max() < 0.99 and gains.abs().max() > 1e-5
    for part, step, prediction, own in zip(parts, steps, predictions, losses.split(4), strict=True):
        (expected,) = torch.autograd.grad(own.mean(), prediction, retain_graph=True)
        torch.testing.assert_close(step.grad.double(), 3 * expected, rtol=1e-2, atol=1e-4 * expected.abs().max())
        assert step.halves == 1 and step.sums["loss"].item() == pytest.approx(own.sum().item(), rel=1e-3)
        assert step.sums["offset"].item() == pytest.approx(len(part) * offset.item(), rel=1e-3, abs=1e-8)

    sums = {name: sum(step.sums[name].item() for step in steps) for name in steps[0].sums}
    means = trainer.method.averages(sums, 6)
    liked = pairs.labels
    assert means["liked"] == pytest.approx(liked.double().mean().item())
    for name, values in (("", torch.cat(errors)), ("ref_", torch.cat(reference))):
        assert means[f"{name}winner_error"] == pytest.approx(values[liked].mean().item(), rel=1e-5)
        assert means[f"{name}loser_error"] == pytest.approx(values[~liked].mean().item(), rel=1e-5)


def test_kto_trains_from_a_listing_and_resumes_bit_for_bit(tiny, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw, rows = np.random.default_rng(0), []
    for number in range(8):
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"fox {number}", "label": number % 3 == 0})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    straight = kto_config(tiny, tmp_path, data={"source": str(folder)}, save={"minutes": 0}, reference={"uses": 2})
    labels = []
    run(straight, lambda trainer, updates: labels.append(trainer.cache.numbers))
    assert labels[0] == [1, 0, 0, 1, 0, 0, 1, 0]
    log = log_of(straight)
    assert [entry["update"] for entry in log] == [1, 2, 3]
    assert log[0]["loss"] == 0.5 and log[0]["offset"] == 0 and all(entry["grad_norm"] > 0 for entry in log)
    assert log[0]["winner_error"] == log[0]["ref_winner_error"] and log[1]["winner_error"] != log[1]["ref_winner_error"]

    def end(trainer, updates):
        if updates == 1:
            trainer.saver.wait()
            raise Ended

    broken = straight.model_copy(update={"output": str(tmp_path / "broken")})
    with pytest.raises(Ended):
        run(broken, end)
    run(broken)
    assert_same_run(straight, broken)


def test_the_micro_batch_does_not_change_what_kto_learns(tiny, tmp_path):
    """The second update's loss, where the offset is no longer 0, after one update with plain gradients."""
    logs = []
    for size in (6, 4):
        train = {"micro_batch": size, "updates": 2, "learning_rate": 1e-5}
        config = kto_config(tiny, tmp_path, output=str(tmp_path / str(size)), train=train)
        run(config)
        logs.append(log_of(config))
    assert logs[0][1]["loss"] != 0.5
    for name in ("loss", "winner_error", "loser_error", "ref_loser_error", "grad_norm"):
        assert logs[0][0][name] == pytest.approx(logs[1][0][name], rel=1e-5, abs=1e-7), name
        assert logs[0][1][name] == pytest.approx(logs[1][1][name], rel=1e-2, abs=1e-7), name


def test_two_processes_learn_kto_as_one(tiny, tmp_path, ranks):
    """7 rows in all, of which two processes have 4 and 3; the offset is that of all of them."""
    train = {"micro_batch": 2, "updates": 2, "learning_rate": 1e-5, "pairs_per_update": 7}
    config = kto_config(tiny, tmp_path, train=train)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    logs = []
    for world in (1, 2):
        output = str(tmp_path / f"world{world}")
        ends = ranks.run(world, "train", tmp_path / "run.yaml", "--output", output)
        assert [end.code for end in ends] == [0] * world, ends[0].out
        logs.append(log_of(config.model_copy(update={"output": output})))
    assert logs[0][0]["offset"] == logs[1][0]["offset"] == 0 and logs[0][0]["liked"] == logs[1][0]["liked"]
    for update, tolerance in enumerate((1e-5, 1e-2)):
        for name in ("loss", "winner_error", "loser_error", "grad_norm"):
            assert logs[0][update][name] == pytest.approx(logs[1][update][name], rel=tolerance), name
    assert logs[0][1]["offset"] == pytest.approx(logs[1][1]["offset"], rel=0.05, abs=1e-8)


def test_kto_needs_labels(tiny, tmp_path):
    with pytest.raises(DataError, match="no labels are read from this kind of data"):
        run(kto_config(tiny, tmp_path, data={"source": "shapes:11:3"}))
