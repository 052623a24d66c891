"""Tests of the ablation: its counts, signs and tables, and a tiny ablation through the command line."""

from __future__ import annotations

import fcntl
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import ablation
from benchmarks.ablations import piece as pieces_module
from benchmarks.ablations.markdown import ablation_tables, regime_tables
from benchmarks.ablations.piece import QUICK, WRONG_SHARE, Rows, changed, wrong_captions
from benchmarks.ablations.rows import RATES, REGIMES, REPORT_SEEDS, ROWS, UPDATES, Piece, pieces
from benchmarks.ablations.signs import LoserSign, RandomSign, SignedMethod
from benchmarks.ablations.tables import best_rates, tables
from seppo_fast.config.load import parse_config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.statistics import paired_difference
from seppo_fast.methods.preference import PreferenceMethod
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import collected, tiny_config

RATES_OF_ALL = dict.fromkeys(ROWS, RATES[0])


@pytest.mark.slow  # processes that import torch, seven runs and their judgements
def test_a_tiny_one_through_the_command_line_and_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ablation.main(["--quick", "--scratch", str(tmp_path / "quick"), "--workers", "2"]) == 0
    made = json.loads((tmp_path / "quick" / "ablation.json").read_text())
    assert {row["row"] for row in made["rows"]} == {"sft", "seppo", "random-sign", "spin-safeguard"}
    assert {row["regime"] for row in made["regimes"]} == {"after-sft"}
    by = {(row["row"], row["update"]): row for row in made["rows"]}
    # 4 pairs: the policy forward and backward on 8 rows, the reference forward on 8, one guided sample in 2 steps.
    assert by["seppo", 1]["row_forwards"] == 8 * 3 + 8 + 2 * 2 and by["seppo", 2]["row_forwards"] == 72
    assert by["sft", 2]["row_forwards"] == 2 * 4 * 3 and by["sft", 2]["samples"] == 0
    assert by["seppo", 2]["samples"] == 2 and by["seppo", 2]["pairs"] == 8
    assert "table-sft" in capsys.readouterr().out


def _finished(rng, prompts=50):
    """Returns finished pieces with made-up scores, and a function that adds a piece with a given gain."""
    base = {scale: rng.random(prompts).round(3).tolist() for scale in ("3", "1.5")}
    finished = {"base": {"commit": "c", "scores": base, "seconds": 9}}

    def add(one, gain):
        stops = [
            {
                "update": stop, "row_forwards": 100 * stop, "pairs": 128 * stop, "samples": 32 * stop, "seconds": 1.0,
                "winner_error": 0.02,
                "scores": {scale: (np.array(scores) + gain + 0.05 * rng.standard_normal(prompts)).tolist()
                           for scale, scores in base.items()},
            }
            for stop in one.stops
        ]  # fmt: skip
        told = {"study": one.study, "row": one.row, "rate": one.rate, "seed": one.seed, "regime": one.regime}
        finished[one.name] = {"commit": "c", **told, "stops": stops}

    return finished, add


def test_tables_are_paired_differences_over_prompts():
    rng = np.random.default_rng(0)
    finished, add = _finished(rng)
    for one in pieces("rates", {}):
        add(one, 0.1 if one.rate == RATES[one.row == "spin"] else 0.0)
    rates = best_rates(finished)
    assert rates == {row: RATES[row == "spin"] for row in ROWS}
    for one in pieces("table", rates):
        add(one, 0.2 if one.row == "sft" else 0.1)
    made = tables(finished)
    assert len(made["rows"]) == sum(len(row.stops) for row in ROWS.values())
    sft = next(row for row in made["rows"] if row["row"] == "sft" and row["update"] == UPDATES)
    names = [Piece("table", "sft", rates["sft"], seed).name for seed in REPORT_SEEDS]
    own = [finished[name]["stops"][0]["scores"]["3"] for name in names]
    expected = paired_difference(finished["base"]["scores"]["3"], np.mean(own, axis=0))
    assert sft["guidance 3"]["low"] == pytest.approx(expected.low)
    assert sft["guidance 3"]["difference"] == pytest.approx(0.2, abs=0.03)
    assert sft["guidance 3"]["against_seppo"]["difference"] == pytest.approx(0.1, abs=0.03)
    assert sft["seeds"] == list(REPORT_SEEDS) and len(sft["guidance 3"]["seed_lows"]) == len(REPORT_SEEDS)
    text = ablation_tables(made)
    assert text.count("| **SePPO** |") == 2 and regime_tables(made) == "Not measured yet."
    assert text.index("| SFT on the same") < text.index("| **SePPO** |")  # best first


def test_a_second_stage_is_compared_with_what_it_began_from():
    finished, add = _finished(np.random.default_rng(1))
    one = Piece("regimes", "seppo", RATES[0], 2, "after-sft")
    add(one, 0.3)
    begin, end = finished[one.name]["stops"]
    assert (begin["update"], end["update"]) == (0, UPDATES)
    (row,) = tables(finished)["regimes"]
    expected = paired_difference(begin["scores"]["1.5"], end["scores"]["1.5"])
    assert row["guidance 1.5"]["difference"] == pytest.approx(expected.difference)
    assert row["guidance 1.5"]["seed_lows"] == [pytest.approx(expected.low)]


def test_rates_come_first_and_what_is_finished_is_not_run_again(tmp_path, capsys):
    work = ablation.Ablation(tmp_path / "results", tmp_path, QUICK)
    with pytest.raises(ConfigError, match="--study rates to its end first"):
        work.missing("table")
    every = work.missing("rates")
    assert len(every) == 2 * len(ROWS)
    file = tmp_path / "results" / f"{every[0].name}.json"
    file.write_text(json.dumps({"study": "other", "seconds": 3}))
    assert work.missing("rates") == every[1:]
    words = ["--results", str(file.parent), "--scratch", str(tmp_path), "--study", "table"]
    assert ablation.main(words) == 2 and "--study rates to its end first" in capsys.readouterr().err
    for content in ("[1, 2", "[]", "{}"):
        file.write_text(content)
        assert ablation.main(words) == 2 and f"{file}: not a result" in capsys.readouterr().err
    assert ablation.main(["--results", str(file)]) == 2 and "--results" in capsys.readouterr().err
    file.unlink()
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert ablation.main([*words[:-1], "rates"]) == 2 and "another ablation" in capsys.readouterr().err
    for words in (["--minutes", "-1"], ["--workers", "0"], ["--study", "rows"]):
        with pytest.raises(SystemExit) as ended:
            ablation.main(words)
        assert ended.value.code == 2


def test_every_piece_has_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces_module, "first_stage", lambda *_: tmp_path / "weights")
    monkeypatch.setattr(pieces_module, "wrong_captions", lambda folder: folder)
    pieces_module.prepare()
    seen = set()
    for study in ("rates", "table", "regimes"):
        for one in pieces(study, RATES_OF_ALL):
            config = pieces_module.config_of(one, tmp_path, tmp_path / one.name, pieces_module.FULL)
            assert config.train.updates == max(one.stops) and UPDATES in one.stops and config.seed == one.seed
            assert config.sampler.round_trip == (one.regime == "model-made" and config.row.negatives == "generated")
            assert one.name not in seen
            seen.add(one.name)
    assert len(REGIMES) == 4


def test_a_fifth_of_the_captions_is_wrong(tmp_path):
    folder = wrong_captions(tmp_path / "data")
    given, true = open_source(str(folder)), open_source(pieces_module.WINNERS)
    wrong = sum(ours.prompt != own.prompt for ours, own in zip(given, true, strict=True))
    assert wrong == pytest.approx(WRONG_SHARE * len(true), abs=10)  # a few are dealt their own caption
    assert Image.open(given[3].image.open()).size == (32, 32)


class _OwnSign(SignedMethod):
    def rejected(self, errors, ref_errors, pairs):
        return (errors <= ref_errors).chunk(2)[0]


@pytest.fixture
def trained(tiny, tmp_path):
    """Yields a trainer after one update, and the pairs that it collects for the next."""
    config = tiny_config(tiny, tmp_path, train={"pairs_per_update": 8, "micro_batch": 8})
    trainer = Trainer(config)
    trainer.add_checkpoint()
    trainer.learner.step(collected(trainer, 0), 0)
    (micro_batch,) = collected(trainer, 1).micro_batches(8)
    apart = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(0))  # so that some reject and some learn
    yield trainer, replace(micro_batch, ref_error=micro_batch.ref_error + apart)
    trainer.references.close()


def test_signs_put_into_the_loss_are_the_methods_own(trained):
    trainer, micro_batch = trained
    ours, theirs = (
        method(trainer.parts).loss(trainer.policy, micro_batch, torch.tensor(1.0))
        for method in (_OwnSign, PreferenceMethod)
    )
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)
    assert ours.sums["loss"].item() == pytest.approx(theirs.sums["preference_loss"].item(), rel=1e-5)
    assert ours.sums["reject_rate"] == theirs.sums["reject"]
    assert 0 < ours.sums["reject_rate"] < 8


def test_chance_keeps_the_rate_and_the_other_sign_looks_at_the_policy_alone(trained):
    trainer, micro_batch = trained
    errors, ref_errors = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).unbind()
    rules = [kind(trainer.parts) for kind in (_OwnSign, RandomSign, LoserSign)]
    own, dealt, loser = (rule.rejected(errors, ref_errors, micro_batch) for rule in rules)
    assert dealt.sum() == own.sum() and not torch.equal(dealt, own)
    assert torch.equal(dealt, rules[1].rejected(errors, ref_errors, micro_batch))
    assert loser.tolist() == [bool(errors[8 + row] > errors[row]) for row in range(8)]


def test_rows_are_counted_both_ways_and_not_while_paused():
    network = torch.nn.Linear(3, 3)
    wrapped = SimpleNamespace(hooks=[], register_forward_hook=lambda hook: wrapped.hooks.append(hook))
    rows = Rows(wrapped)

    def forward(count, trained):
        output = network(torch.randn(count, 3)) if trained else torch.randn(count, 3)
        wrapped.hooks[0](None, None, (output,))
        return output

    forward(5, False)
    output = forward(4, True)
    forward(3, True)  # no backward runs through it
    output.sum().backward()
    assert (rows.forward, rows.backward, rows.equivalent) == (12, 4, 20)
    rows.paused = True
    forward(7, True).sum().backward()
    assert rows.equivalent == 20


def test_changes_are_refused_as_everywhere(tmp_path):
    with pytest.raises(Exception, match="learning_rte"):
        changed("demo.yaml", {"train.learning_rte": 1.0}, tmp_path, tmp_path)
    assert parse_config(changed("demo.yaml", {}, tmp_path / "a", tmp_path / "b").model_dump()).log.health_every == 0
