"""Tests of `benchmarks.anchor`: its statistics against sums by hand, and the whole command on a tiny pipeline."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import anchor
from benchmarks.checks import anchor_statistics
from benchmarks.checks.anchor_gradients import Halves, comparison, dot, size
from benchmarks.checks.anchor_judge import worse, wrong
from benchmarks.checks.anchor_model import Examples, weights_of
from benchmarks.checks.anchor_statistics import agreement, auc, auc_of_pairs, bands, mean_by_band
from seppo_fast.config.load import read_config, to_yaml
from seppo_fast.distributed.processes import Processes
from seppo_fast.runs.checkpoint import newest_state
from seppo_fast.train import train
from seppo_fast.train.setup import set_up
from tests.helpers.runs import tiny_config
from tests.helpers.tiny import tiny_pipeline

PAIRS, DRAWS = 6, 3


def area_by_hand(scores, positive):
    """Returns the share of (positive, negative) pairs that are in order; a tie counts half."""
    pairs = [(a, b) for a, yes in zip(scores, positive) if yes for b, also in zip(scores, positive) if not also]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def test_agreement_by_hand():
    rng = np.random.default_rng(3)
    differences = rng.integers(-4, 6, (23, 5))  # sums are exact, and there are ties of both kinds
    chosen = rng.random((23, 5)) < 0.6
    agree, positive, ties = [], [], 0
    for row, draw in np.argwhere(chosen):
        others = sum(differences[row, other] for other in range(5) if other != draw)
        if differences[row, draw] == 0 or others == 0:
            ties += 1
        else:
            agree.append((differences[row, draw] > 0) == (others > 0))
            positive.append(others > 0)
    share = sum(positive) / len(positive)
    found = agreement(differences / 8, chosen)
    assert ties > 5 and (found["draws"], found["ties"]) == (len(agree), ties)
    assert found["agree"] == pytest.approx(sum(agree) / len(agree))
    assert found["majority"] == pytest.approx(max(share, 1 - share))


def test_agreement_of_small_tables():
    # Row 1: the means of each draw's others are 0, 1.5 and 0.5; row 2 agrees throughout.
    table = np.array([[2.0, -1.0, 1.0], [-1.0, -2.0, -3.0]])
    # 2 against 0: left out; -1 against 1.5: no; 1 against 0.5: yes; row 2: three times yes, all negative.
    assert agreement(table) == {"agree": 4 / 5, "majority": 3 / 5, "draws": 5, "ties": 1}
    first = np.array([[True, True, True], [False, False, False]])
    assert agreement(table, first) == {"agree": 1 / 2, "majority": 1.0, "draws": 2, "ties": 1}
    assert agreement(np.zeros((2, 3))) == {"agree": None, "majority": None, "draws": 0, "ties": 6}


@pytest.mark.parametrize("seed", range(3))
def test_auc_by_hand(seed):
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 12, 60) / 4, rng.random(60) < 0.3
    assert auc(scores, positive) == pytest.approx(area_by_hand(scores, positive), abs=1e-12)
    often = rng.integers(0, 4, 60)
    repeated = area_by_hand(scores.repeat(often), positive.repeat(often))
    assert auc(scores, positive, often) == pytest.approx(repeated, abs=1e-12)
    assert auc(scores, np.zeros(60, bool)) is None is auc(scores, np.ones(60, bool))


def test_the_bootstrap_draws_pairs_with_all_their_draws(monkeypatch):
    monkeypatch.setattr(anchor_statistics, "RESAMPLES", 25)
    rng = np.random.default_rng(5)
    scores, positive, known = rng.normal(size=(14, 3)), rng.random(14) < 0.5, rng.random(14) < 0.8
    found = auc_of_pairs(scores, positive, known, seed=7)
    kept, verdict = scores[known], positive[known]
    assert found["auc"] == pytest.approx(area_by_hand(kept.ravel(), verdict.repeat(3)))
    draws = anchor_statistics.keyed_rng(7, "anchor bootstrap")
    areas = []
    for _ in range(25):
        rows = draws.integers(len(kept), size=len(kept))
        areas.append(area_by_hand(kept[rows].ravel(), verdict[rows].repeat(3)))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(areas, [0.025, 0.975]).tolist())
    counts = [found[name] for name in ("positives", "negatives", "scores", "left_out", "resamples")]
    assert counts == [verdict.sum(), len(kept) - verdict.sum(), 3, 14 - len(kept), 25]


def test_the_interval_is_as_wide_as_delongs():
    rng = np.random.default_rng(11)
    positive = np.arange(300) % 3 == 0
    scores = rng.normal(size=300) + 0.5 * positive
    yes, no = scores[positive], scores[~positive]
    order = (yes[:, None] > no).astype(float)
    error = math.sqrt(order.mean(1).var(ddof=1) / len(yes) + order.mean(0).var(ddof=1) / len(no))
    found = auc_of_pairs(scores[:, None], positive, np.ones(300, bool), seed=0)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found["low"] < found["auc"] < found["high"]


def test_an_empty_class_has_no_auc():
    found = auc_of_pairs(np.ones((4, 2)), np.ones(4, bool), np.array([True, True, False, True]), seed=0)
    assert [found[name] for name in ("auc", "low", "high")] == [None] * 3
    assert (found["positives"], found["negatives"], found["left_out"], found["resamples"]) == (3, 0, 1, 0)
    nothing = auc_of_pairs(np.ones((4, 2)), np.ones(4, bool), np.zeros(4, bool), seed=0)
    assert nothing["auc"] is None and nothing["left_out"] == 4


def test_means_by_band():
    position = np.array([[0.0, 0.249], [0.25, 0.999], [1.0, 0.5]])
    assert bands(position, 4).tolist() == [[0, 0], [1, 3], [3, 2]]
    found = mean_by_band(np.arange(6.0).reshape(3, 2), position, 4)
    assert [one["mean"] for one in found] == [0.5, 2, 5, 3.5] and [one["draws"] for one in found] == [2, 1, 1, 2]
    assert mean_by_band(np.ones((3, 2)), position, 100)[1] == {"mean": None, "draws": 0}


def test_halves_tell_a_gradient_from_its_noise():
    signal, other, noise, more = (torch.tensor([float(n == k) for k in range(4)]) for n in range(4))
    winners = Halves([2 * signal + 5 * noise], [2 * signal + 5 * more])
    others = Halves([3 * signal + 4 * other + 5 * noise], [3 * signal + 4 * other + 5 * more])
    measured = size(winners)
    assert measured["norm"] == pytest.approx(math.sqrt(4 + 2 * 2.5**2))
    assert measured["norm_without_noise"] == pytest.approx(2)
    assert measured["cosine_of_halves"] == pytest.approx(4 / 29)
    found = comparison(winners, others)
    assert found["ratio_without_noise"] == pytest.approx(5 / 2) and found["cosine_without_noise"] == pytest.approx(0.6)
    mean_w, mean_o = ((half.first[0] + half.second[0]) / 2 for half in (winners, others))
    assert found["ratio"] == pytest.approx(float(mean_o.norm() / mean_w.norm()))
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(mean_w, mean_o, dim=0)))
    assert found["ratio_of_halves"] == pytest.approx([math.sqrt(50 / 29)] * 2)
    assert found["cosine_of_halves"] == pytest.approx([31 / math.sqrt(29 * 50)] * 2)
    lost = comparison(Halves([noise], [more]), others)
    assert lost["ratio_without_noise"] is None is lost["cosine_without_noise"]


def test_verdicts():
    scores = np.array([0.5, 1.0, np.nan, 0.75])
    assert [part.tolist() for part in wrong(scores, "shapes")] == [
        [True, False, False, True],
        [True, True, False, True],
    ]
    assert wrong(scores, "module:function").positive.tolist() == [True, False, False, False]  # the median is 0.75
    found = worse(scores, np.array([0.5, np.nan, 1.0, 0.8]))
    assert found.positive.tolist() == [False, False, False, True] and found.known.tolist() == [True, False, False, True]


@pytest.fixture(scope="module", params=["full", "lora"])
def runs(request, tiny, tmp_path_factory):
    """Returns a folder with a recipe, a run of it that moved the weights, and a run that did not."""
    folder = tmp_path_factory.mktemp(request.param)
    configs = {}
    for name, rate in {"moved": 1e-2, "still": 1e-30}.items():
        config = tiny_config(
            tiny,
            folder,
            output=str(folder / name),
            model={"train": request.param},
            train={"learning_rate": rate, "weight_decay": 0.0},
        )
        train(config)
        configs[name] = config
    (folder / "recipe.yaml").write_text(to_yaml(configs["moved"].model_copy(update={"output": str(folder / "none")})))
    return folder


@pytest.fixture
def redness(tmp_path, monkeypatch):
    """Writes a module with a judge that gives one of the pairs no score, and returns the judge's name."""
    code = "def mean(prompts, pictures):\n    scores = pictures[..., 0].mean((1, 2))\n    scores[0] = float('nan')\n"
    (tmp_path / "redness.py").write_text(f"{code}    return scores\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "redness:mean"


def words(folder, *more):
    return ["--config", str(folder / "recipe.yaml"), "--pairs", str(PAIRS), "--draws", str(DRAWS), *more]


def test_the_command(runs, redness, tmp_path, capsys):
    file = tmp_path / "new" / "anchor.json"
    folders = [str(runs / name) for name in ("moved", "still")]
    assert anchor.main(words(runs, "--checkpoint", *folders, "--judge", redness, "--json", str(file))) == 0
    result = json.loads(file.read_text())
    assert not (runs / "none").exists() and str(tmp_path) not in json.dumps(result)
    moved, still = result["checkpoints"]
    everything = PAIRS * DRAWS
    # Equal weights give equal errors bit for bit, even after another policy was loaded.
    assert still["mean_abs_d_w"] == 0 and still["weight_distance"] < 1e-20
    assert still["agreement"] == {"agree": None, "majority": None, "draws": 0, "ties": everything}
    assert moved["weight_distance"] > 0 < moved["mean_abs_d_w"] and moved["agreement"]["draws"] == everything
    assert 0 <= moved["agreement"]["agree"] <= 1 and 0.5 <= moved["agreement"]["majority"] <= 1
    assert sum(part["draws"] for part in moved["agreement_by_band"]) == everything
    for found, verdicts, scores in ((result["base"], 2, 1), (moved, 3, 3), (still, 3, 3)):
        assert len(found["auc"]) == verdicts * scores
        for row in found["auc"]:
            one, mean = row["one_draw"], row["mean_of_draws"]
            assert one["positives"] + one["negatives"] == PAIRS - 1 and one["left_out"] == 1
            assert (one["scores"], mean["scores"]) == (DRAWS, 1)
            assert (one["auc"] is None) == (not (one["positives"] and one["negatives"]))
    # The policy that did not move generates the base's samples again, so none is worse.
    assert still["auc"][-1]["verdict"] == anchor.WORSE_THAN_POLICY and still["auc"][-1]["one_draw"]["positives"] == 0
    for found in result["base"]["errors"].values():
        assert len(found) == 10 and sum(band["draws"] for band in found) == everything
    gradient = result["base"]["gradients"][anchor.SAMPLES]
    assert gradient["against_winners"]["ratio"] > 0 and gradient["draws"] == everything
    printed = capsys.readouterr().out
    assert anchor.anchor_table(result) in printed
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert any("moved, update 3" in line for line in tables) and "ties left out" in printed
    assert any("0 to 25 %" in line for line in tables) and any("90 to 100 %" in line for line in tables)


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """Returns a folder with a recipe but no run."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recipe.yaml").write_text(to_yaml(tiny_config(tiny, folder)))
    return folder


def test_without_a_checkpoint_and_a_judge(recipe, tmp_path, capsys):
    file = tmp_path / "anchor.json"
    assert anchor.main(words(recipe, "--json", str(file))) == 0
    result = json.loads(file.read_text())
    assert result["checkpoints"] == [] and "auc" not in result["base"]
    table = anchor.anchor_table(result)
    assert table in capsys.readouterr().out
    assert "AUC" not in table and "ties" not in table and "6 pairs, 3 draws" in table


@pytest.fixture
def examples(runs):
    setup = set_up(read_config(runs / "recipe.yaml"), Processes(), None)
    return setup, Examples(setup, 4, 2, seed=1)


def test_gradients_are_those_of_the_errors(examples):
    setup, four = examples
    halves = four.gradients(setup.policy, four.winners)
    weights = [weight for weight in setup.policy.parameters() if weight.requires_grad]
    assert all(weight.grad is None for weight in weights)
    step = 1e-3 / size(halves)["norm"]
    means = []
    for sign in (1, -1):
        with torch.no_grad():
            for weight, first, second in zip(weights, *halves):
                weight += sign * step * (first + second) / 2
        means.append([four.errors(setup.policy, four.winners)[half::2].mean() for half in (0, 1)])
        with torch.no_grad():
            for weight, first, second in zip(weights, *halves):
                weight -= sign * step * (first + second) / 2
    whole = [(first + second) / 2 for first, second in zip(*halves)]
    for half in (0, 1):
        slope = (means[0][half] - means[1][half]) / (2 * step)
        assert slope == pytest.approx(dot(whole, halves[half]), rel=0.02)


def test_draws_belong_to_their_pair(examples):
    setup, four = examples
    more = Examples(setup, 7, 3, seed=1)
    assert np.array_equal(more.position[:4, :2], four.position) and more.prompts[:4] == four.prompts
    assert torch.equal(more.winners[:4], four.winners)
    errors = four.errors(setup.policy, four.winners), more.errors(setup.policy, more.winners)[:4, :2]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)  # other batch sizes round differently
    samples = four.sampled(setup.policy)
    assert torch.allclose(more.sampled(setup.policy)[:4], samples, atol=1e-3)
    assert not np.array_equal(Examples(setup, 4, 2, seed=2).position, four.position)


def test_the_distance_of_weights(examples, runs):
    setup, _ = examples
    before = {name: weight.detach().clone() for name, weight in setup.policy.named_parameters()}
    saved = newest_state(runs / "moved")
    after = saved.tensors("policy")
    with weights_of(setup.policy, saved) as distance:
        assert any(not torch.equal(weight, before[name]) for name, weight in setup.policy.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in setup.policy.named_parameters())
    if setup.config.model.train == "full":
        changes = [after[name] - weight for name, weight in before.items()]
        base = list(before.values())
    else:
        downs = [name for name in after if "lora_A" in name]
        changes = [after[name.replace("lora_A", "lora_B")] @ after[name] for name in downs]
        base = [before[name.replace("lora_A.default", "base_layer")] for name in downs]
    norms = [math.sqrt(sum(float(tensor.double().square().sum()) for tensor in parts)) for parts in (changes, base)]
    assert distance == pytest.approx(norms[0] / norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--draws", "1"], "--draws 1: at least 2 are needed"),
        (["--pairs", "1"], "--pairs 1: at least 2 are needed"),
        (["--pairs", "12"], "--pairs 12: the data has only 11 examples"),
        (["--checkpoint", "no-such-run"], "no-such-run: not the folder of a run with a saved state"),
        (["--judge", "triangles"], "'triangles' is unknown; give shapes, or module:function"),
        (["--judge", "no_such_module:f"], "cannot be imported: ModuleNotFoundError"),
        (["--judge", "math:no_such_function"], "cannot be imported: AttributeError"),
        (["--judge", "math:pi"], "is a float and cannot be called"),
        (["--judge", "shapes"], "cannot score these prompts and pictures"),  # it accepts only pictures of 32 pixels
        (["--judge", "builtins:max"], "--judge"),
        (["--config", "no-such.yaml"], "does not exist"),
        (["--json", "/dev/null/result.json"], "--json"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(recipe, more, said, capsys):
    assert anchor.main(words(recipe, *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("anchor: ") and said in lines[0]


def test_a_run_of_another_model_is_refused(runs, tmp_path, capsys):
    other = tiny_config(tiny_pipeline(tmp_path / "other", seed=1), tmp_path)
    (tmp_path / "other.yaml").write_text(to_yaml(other))
    assert (
        anchor.main([*words(runs, "--checkpoint", str(runs / "moved")), "--config", str(tmp_path / "other.yaml")]) == 2
    )
    assert "started from another model" in capsys.readouterr().err


def test_clips(tiny, adapter, tmp_path):
    model = {"path": str(tiny), "motion_adapter": str(adapter), "train": "lora", "precision": "fp32"}
    config = tiny_config(
        tiny, tmp_path, model=model, data={"source": "shapes-motion:4", "frames": 2}, sampler={"round_trip": True}
    )
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    result_file = tmp_path / "clips.json"
    assert anchor.main(words(tmp_path, "--pairs", "2", "--draws", "2", "--json", str(result_file))) == 0
    result = json.loads(result_file.read_text())
    assert result["x_l"] == anchor.PIXELS
    assert set(result["base"]["errors"]) == {anchor.WINNERS, anchor.SAMPLES, anchor.PIXELS}
