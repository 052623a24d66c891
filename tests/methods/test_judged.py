"""The objective `seppo-judged`: verdicts, loss and gradient, whole runs, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from seppo_fast.cli import main
from seppo_fast.config.load import parse_config
from seppo_fast.methods.preference import preference_sums
from seppo_fast.methods.rewards import scoring
from seppo_fast.methods.rewards.judge import Judge
from seppo_fast.methods.rewards.judged import JudgedMethod, judged_loss
from seppo_fast.runs.signals import Interrupted
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import collected, log_of, tiny_config
from tests.helpers.same_run import assert_same_run

JUDGED = {"objective": "seppo-judged", "reference": {"judge": "brightness", "uses": 2}}


class Scores:
    """A scorer that returns scores by the first pixel of each picture."""

    name, version, digest, higher_is_better, cut = "made", "1", "0", True, 0

    def __init__(self, scores, fails=()):
        self.scores, self.fails, self.seen = scores, fails, []

    def __call__(self, prompts, pictures):
        firsts = pictures[:, 0, 0, 0].tolist()
        self.seen.append((list(prompts), firsts))
        if set(firsts) & set(self.fails):
            raise RuntimeError("cannot score this one\nat all")
        return np.array([self.scores[first] for first in firsts])


class Family:
    """Decodes a latent to a picture of its first value; parks nothing."""

    frames, parked = None, 0

    def decode(self, latents):
        return latents[:, :1, :1, :1].to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 2, 2, 3).numpy()

    def park_encoders(self):
        self.parked += 1


class Cache:
    """Five examples; the latents of winner i are i + 1."""

    prompts = tuple(f"prompt {number}" for number in range(5))

    def __len__(self):
        return 5

    def winners(self, examples):
        return torch.stack([torch.full((4, 2, 2), example + 1.0) for example in examples])


def verdicts(scores, ids, **options):
    """Returns the verdicts on samples whose latents are 101, 102, ..., by the given scores."""
    family = Family()
    scorer = Scores(scores, **options)
    samples = torch.stack([torch.full((4, 2, 2), 101.0 + row) for row in range(len(ids))])
    return Judge(scorer, family, Cache())(ids, samples).tolist(), scorer, family


def test_a_better_sample_is_learned_from_and_a_tie_rejects():
    scores = {2: 0.5, 4: 0.5, 1: 0.5, 101: 0.6, 102: 0.4, 103: 0.5}
    found, scorer, family = verdicts(scores, [6, 3, 5])  # examples 1, 3, 0
    assert found == [-1.0, 1.0, 1.0] and family.parked == 1
    assert scorer.seen == [(["prompt 1", "prompt 3", "prompt 0"] * 2, [2, 4, 1, 101, 102, 103])]


def test_where_lower_is_better_the_signs_are_the_other_way_round(monkeypatch):
    monkeypatch.setattr(Scores, "higher_is_better", False)
    assert verdicts({1: 0.5, 2: 0.5, 101: 0.6, 102: 0.4}, [0, 1])[0] == [1.0, -1.0]


def test_a_pair_without_a_score_is_skipped_and_the_others_are_not(capsys):
    scores = {1: 0.5, 2: np.nan, 3: 0.5, 101: 0.6, 102: 0.6, 103: 0.7}
    assert verdicts(scores, [0, 1, 2])[0] == [-1.0, 0.0, -1.0]
    scores = {1: 0.5, 2: 0.5, 3: 0.5, 101: 0.6, 102: 0.6, 103: np.inf}
    found, scorer, _ = verdicts(scores, [0, 1, 2], fails=[102])
    assert found == [-1.0, 0.0, 0.0] and len(scorer.seen) == 4  # together, then one by one
    out = capsys.readouterr()
    said = out.out + out.err
    assert said.count("reference.judge = made failed (RuntimeError: cannot score this one); pairs without") == 1


def test_a_scorer_without_a_single_score_ends_the_run_and_one_with_some_does_not():
    scores = {1: 0.0, 101: np.nan, 102: 1.0}
    first = torch.full((1, 4, 2, 2), 101.0)
    deaf = Judge(Scores(scores), Family(), Cache())
    for _ in range(scoring._ENOUGH - 1):  # a process may have one sample per update
        assert deaf([0], first).tolist() == [0.0]
    with pytest.raises(ConfigError, match=f"no score for any of {scoring._ENOUGH} samples"):
        deaf([0], first)
    heard = Judge(Scores(scores), Family(), Cache())
    assert heard([0], first + 1).tolist() == [-1.0]
    assert [heard([0], first).item() for _ in range(scoring._ENOUGH)] == [0.0] * scoring._ENOUGH


def test_means_leave_out_skipped_pairs_where_the_sign_counts():
    """Of four pairs two reject, one learns with a positive logit, one is skipped."""
    generator = torch.Generator().manual_seed(5)
    ref = torch.rand(8, generator=generator)
    errors = ref + 4e-3 * torch.randn(8, generator=generator)
    sign = torch.tensor([1.0, 1.0, -1.0, 0.0])
    errors[2], errors[6] = ref[2] - 0.01, ref[6] - 0.01
    result = judged_loss(errors, ref, sign, beta=500.0)
    sums = {name: value.item() for name, value in preference_sums(result, 500.0).items()}
    means = JudgedMethod.averages(None, sums | {"judge_skipped": 1.0, "anchor_agrees": 3.0}, 4)
    assert means["judge_skipped"] == 0.25 and means["anchor_agrees"] == 1.0
    assert means["aaf_rate"] == pytest.approx(2 / 3) and means["implicit_acc_learned"] == 1.0
    assert means["preference_loss"] == pytest.approx(means["loss"] * 4 / 3)
    assert means["winner_error"] == pytest.approx(errors[:4].double().mean().item())
    nothing = JudgedMethod.averages(None, sums | {"judge_skipped": 4.0, "anchor_agrees": 0.0}, 4)
    assert nothing["judge_skipped"] == 1 and "aaf_rate" not in nothing and np.isfinite(nothing["loss"])


def test_running_out_of_memory_is_not_a_failure_of_the_scorer(monkeypatch):
    monkeypatch.setattr(scoring, "is_out_of_memory", lambda problem: True)
    with pytest.raises(RuntimeError, match="cannot score"):
        verdicts({1: 0.0, 101: 0.0}, [0], fails=[101])


@pytest.mark.parametrize("sft_weight", [0.0, 3.0])
def test_the_loss_and_its_gradient_are_the_formulas_in_float64(sft_weight):
    generator = torch.Generator().manual_seed(5)
    ref = torch.rand(14, generator=generator)
    errors = (ref + 4e-3 * torch.randn(14, generator=generator)).requires_grad_()
    sign = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 0.0, 1.0])
    made = judged_loss(errors, ref, sign, beta=500.0, sft_weight=sft_weight)
    (grad,) = torch.autograd.grad(made.loss, errors)

    total, expected = 0.0, torch.zeros(14, dtype=torch.float64)
    e, r = errors.detach().double(), ref.double()
    for row, a in enumerate(sign.tolist()):
        z = 250 * ((e[row] - r[row]) - a * (e[row + 7] - r[row + 7]))
        plain = 125 * sft_weight
        total += (abs(a) * torch.log1p(torch.exp(z)) + plain * e[row]).item() / 7
        expected[row] = (abs(a) * 250 * torch.sigmoid(z) + plain) / 7
        expected[row + 7] = -a * 250 * torch.sigmoid(z) / 7
    assert made.loss.item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert made.reject.tolist() == [True, False, False, True, False, False, True]
    assert made.loss.item() == pytest.approx((made.preference_loss + made.sft_loss).item(), rel=1e-6)
    assert grad[[2 + 7, 5 + 7]].tolist() == [0.0, 0.0]


def test_a_rollout_gives_each_pair_its_samples_verdict(tiny, tmp_path):
    trainer = Trainer(tiny_config(tiny, tmp_path, **JUDGED))
    trainer.add_checkpoint()
    pairs = collected(trainer, 0)
    pictures = [trainer.family.decode(half) for half in (pairs.winners[::2], pairs.losers[::2])]
    won, made = (half.reshape(len(half), -1).mean(1) for half in pictures)
    expected = [-1.0 if sample > winner else 1.0 for winner, sample in zip(won, made, strict=True)]
    assert pairs.verdict.tolist() == [verdict for verdict in expected for _ in range(2)]
    parts = [part.verdict.tolist() for part in pairs.micro_batches(4)]
    assert parts[0] + parts[1] == pairs.verdict.tolist()
    assert pairs.to(torch.device("cpu")).verdict is not None


def test_equal_weights_give_ln_2_and_a_gradient(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path, **JUDGED, train={"updates": 2})
    train(config)
    first, second = log_of(config)
    assert first["loss"] == np.float32(np.log(2)) and first["grad_norm"] > 0
    assert first["judge_skipped"] == 0 and 0 <= first["anchor_agrees"] <= 1
    assert first["anchor_agrees"] == first["aaf_rate"]  # at equal weights the anchor test rejects every pair
    assert second["loss"] != first["loss"]


def test_a_run_that_stops_in_the_middle_resumes_to_the_same_weights(tiny, tmp_path):
    def config(name, **more):
        return tiny_config(tiny, tmp_path, **JUDGED, output=str(tmp_path / name), save={"minutes": 0}, **more)

    straight = config("straight")
    train(straight)

    def stop(trainer, updates):
        if updates == 1:
            raise Interrupted("here")

    with pytest.raises(Interrupted):
        train(config("stopped"), observe=stop)
    train(config("stopped"))
    assert_same_run(straight, config("stopped"))


def test_another_judge_is_refused_on_resuming(tiny, tmp_path, monkeypatch):
    config = tiny_config(tiny, tmp_path, **JUDGED, save={"minutes": 0}, train={"updates": 1})
    train(config)
    other = tiny_config(tiny, tmp_path, **JUDGED, save={"minutes": 0}, train={"updates": 2})
    monkeypatch.setattr("seppo_fast.train.setup.load_scorer", lambda *arguments: Scores({}))
    with pytest.raises(ConfigError, match="the judge changed since the run was started"):
        train(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"objective": "seppo-judged"}, "'seppo-judged' needs reference.judge"),
        ({"reference": {"judge": "shapes"}}, "'seppo' uses no scorer"),
        ({"reference": {"judge_weights": "here"}}, "'seppo' uses no scorer"),
        ({"train": {"safeguard": True}}, "train.safeguard is not available for objective 'seppo-judged'"),
        ({"train": {"tie_tol": 0.1}}, "train.tie_tol is a setting of the anchor test"),
    ],
)
def test_settings_that_do_not_fit_are_refused(text, message):
    judged = {"objective": "seppo-judged", "reference": {"judge": "shapes"}} if "train" in text else {}
    with pytest.raises(ConfigError, match=message):
        parse_config(judged | text)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brightnes", "did you mean 'brightness'"),
        ("pickscore", "scorer pickscore: missing"),
        ("no_such_module:score", "cannot be imported"),
    ],
)
def test_a_judge_that_cannot_be_used_is_refused_before_anything_is_loaded(
    tiny, tmp_path, capsys, monkeypatch, name, message
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = tiny_config(tiny, tmp_path, **JUDGED).model_dump(mode="json")
    settings["reference"]["judge"] = name
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))
    for command in ("check", "train"):
        assert main([command, str(file)]) == 2
        assert message in capsys.readouterr().err
    assert not Path(settings["output"]).exists()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
