"""The comparison of all methods: its configurations, where runs are read, what is counted, its tables."""

import json

import numpy as np
import pytest

from benchmarks import methods
from benchmarks.ablations.piece import changed
from benchmarks.comparison.piece import Counts, Finished, Reader, run_piece
from benchmarks.comparison.rows import BUDGETS, FROM_ABLATION, ROWS, Piece, pieces
from benchmarks.comparison.tables import best_rates, method_tables, tables
from benchmarks.harness.work import Work
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.evaluation.statistics import paired_difference
from seppo_fast.methods.generation import Generation
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import collected, tiny_config


@pytest.fixture(autouse=True)
def ordinary_generation(monkeypatch):
    """Counting replaces this method, in a process that does nothing else."""
    monkeypatch.setattr(Generation, "__call__", Generation.__call__)


def test_every_method_has_a_row_and_every_row_a_configuration(tmp_path):
    variants = {"seppo-r", "seppo-indicator", "seppo-never", "seppo-initial", "seppo-newest"}
    compared = {row.objective for row in ROWS.values()} | set(FROM_ABLATION)
    assert compared | variants == set(OBJECTIVES)
    for name, row in ROWS.items():
        config = changed("demo.yaml", Piece("rates", name, 3e-5, 100).settings(), tmp_path / "run", tmp_path / "cache")
        assert config.objective == row.objective and config.train.learning_rate == 3e-5
        assert row.by_judge == (config.scorer is not None)
    assert len(list(pieces("rates", {}))) == 3 * len(ROWS)
    assert [piece.seed for piece in pieces("table", dict.fromkeys(ROWS, 1e-5))] == [
        seed for seed in (1, 2, 3) for _ in ROWS
    ]


def test_what_two_updates_of_grpo_and_seppo_use(tiny, tmp_path):
    """Rows through the network by the formulas, a backward counted as two forwards."""
    quiet = {"log": {"health_every": 0, "sample_every": 0}}
    settings = {"rl": {"reward": "brightness", "samples_per_prompt": 3}, "data": {"prompt_dropout": 0}}
    trainer = Trainer(tiny_config(tiny, tmp_path, objective="grpo", train={"updates": 2}, **settings, **quiet))
    counts = Counts(trainer)
    for update in range(2):
        if not update:
            trainer.add_checkpoint()
        trainer.learner.step(collected(trainer, update), update)
    # 12 guided samples in 2 steps, 12 rows of 2 steps trained (forward and backward), those of the second update twice.
    assert counts.used(0) == {"pairs": 24, "samples": 12, "rows": 12 * 4 + 24 * 2 * 3 + 12 * 2}

    trainer = Trainer(tiny_config(tiny, tmp_path, output=str(tmp_path / "seppo"), **quiet))
    counts = Counts(trainer)
    trainer.add_checkpoint()
    trainer.learner.step(collected(trainer, 0), 0)
    # Both updates of the iteration are sampled and their reference errors computed at once: 8 + 2 S rows per pair.
    assert counts.used(100) == {"pairs": 6, "samples": 12, "rows": 100 + 12 * (4 + 2) + 6 * 6}


class Run:
    """Stands in for a trainer whose learner does nothing."""

    def __init__(self):
        self.scored = []


def test_a_run_is_read_once_where_it_reaches_budgets_and_ends_with_its_rows(monkeypatch):
    monkeypatch.setattr(Reader, "_scores", lambda self, trainer, scale: [scale])
    uses = iter([(0, 0, 0), (10, 20, 97), (20, 20, 294), (30, 20, 500)])
    reader = Reader({"pairs": 20, "samples": 20, "rows": 300}, [], 0, (3.0,), 0)

    class Used:
        network = type("Network", (), {"paused": False})()

        def used(self, before):
            return dict(zip(("pairs", "samples", "rows"), next(uses), strict=True))

    reader._counts = Used()
    reader(Run(), 0)
    assert reader.found == []
    reader(Run(), 1)
    with pytest.raises(Finished):
        reader(Run(), 2)
    assert [(stop["update"], stop["reached"]) for stop in reader.found] == [(1, ["samples"]), (2, ["pairs", "rows"])]
    assert reader.found[1]["rows"] == 294 and reader.found[1]["scores"] == {"3": [3.0]}  # within 2 % of the budget


def piece(row, seed, gain, *, rate=1e-5, study="table", reached=("pairs", "samples", "rows"), rng=None):
    scores = (rng or np.random.default_rng(seed)).normal(0.5 + gain, 0.1, 40).tolist()
    scales = {"3": scores, "1.5": scores} | ({"1": scores} if ROWS[row].by_judge else {})
    stop = {"update": 7, "reached": list(reached), "pairs": 10, "samples": 5, "rows": 99, "seconds": 3.0}
    told = {"study": study, "row": row, "rate": rate, "seed": seed, "commit": "abc", "seconds": 60}
    return told | {"stops": [stop | {"scores": scales}]}


def made_results():
    base = np.random.default_rng(9).normal(0.5, 0.1, 40).tolist()
    results = {"base": {"commit": "abc", "seconds": 1, "scores": dict.fromkeys(("3", "1.5", "1"), base)}}
    for seed in (1, 2):
        results[f"nft{seed}"] = piece("nft", seed, 0.1 * seed)
        results[f"mapo{seed}"] = piece("mapo", seed, 0.05, reached=("rows",))
    return results


def test_tables_compare_the_mean_over_seeds_with_the_base():
    results = made_results()
    seppo = {"study": "table", "row": "seppo", "regime": "", "rate": 1e-4, "seed": 1, "stops": [
        {"update": 40, "pairs": 5120, "samples": 1280, "row_forwards": 71680, "seconds": 9.0,
         "scores": {"3": results["base"]["scores"]["3"], "1.5": results["base"]["scores"]["1.5"]}}]}  # fmt: skip
    made = tables(results, {"table-seppo": seppo, "regimes-seppo": seppo | {"study": "regimes"}})
    entries = {(entry["budget"], entry["row"]): entry for entry in made["entries"]}
    assert set(entries) == {(b, r) for b in BUDGETS for r in ("nft", "seppo")} | {("rows", "mapo")}
    nft = entries["rows", "nft"]
    mean = np.mean([results[f"nft{seed}"]["stops"][0]["scores"]["3"] for seed in (1, 2)], axis=0)
    expected = paired_difference(results["base"]["scores"]["3"], mean)
    assert nft["gains"]["3"]["difference"] == pytest.approx(expected.difference) and nft["seeds"] == [1, 2]
    assert nft["gains"]["3"]["low"] == pytest.approx(expected.low)
    assert nft["gains"]["3"]["by_seed"][1] - nft["gains"]["3"]["by_seed"][0] == pytest.approx(0.1, abs=0.08)
    assert entries["pairs", "seppo"]["gains"]["3"]["difference"] == 0 and entries["rows", "seppo"]["rows"] == 71680
    text = method_tables(json.loads(json.dumps(made)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    equal_compute = lines[-3:]
    assert [line.split("|")[1].strip() for line in equal_compute] == ["MaPO", "SePPO", "*DiffusionNFT*"]
    assert "nft 60" in text and method_tables({"entries": []}) == "Not measured yet."


def test_the_best_rate_is_that_of_development_prompts():
    results = {
        f"{rate}": piece("nft", 100, gain, rate=rate, study="rates")
        for rate, gain in ((1e-5, 0.0), (3e-5, 0.2), (1e-4, -0.3))
    }
    assert best_rates(results) == {"nft": 3e-5}
    del results["1e-05"]
    assert best_rates(results) == {}  # not all of its rates have been tried


def test_the_table_needs_rates_and_what_is_finished_is_not_run_again(tmp_path, capsys):
    work = Work("comparison", tmp_path / "results", tmp_path)
    with pytest.raises(ConfigError, match="needs the learning rates of nft; run --study rates"):
        methods.missing(work, "table", ["nft"])
    every = methods.missing(work, "rates", ["nft", "spo"])
    assert len(every) == 6
    (tmp_path / "results" / f"{every[0].name}.json").write_text(json.dumps({"study": "other", "seconds": 3}))
    assert methods.missing(work, "rates", ["nft", "spo"]) == every[1:]
    words = ["--results", str(work.results), "--scratch", str(tmp_path), "--study", "table", "--rows", "nft"]
    assert methods.main(words) == 2 and "needs the learning rates of nft" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        methods.main(["--rows", "nftt"])


def test_a_tiny_piece_is_trained_and_read(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    one = Piece("table", "nft", 1e-5, 1)
    run_piece(one, str(tmp_path), str(tmp_path / "results"), quick=True)
    found = json.loads((tmp_path / "results" / f"{one.name}.json").read_text())
    (stop,) = found["stops"]
    assert stop["reached"] == ["pairs", "rows"] and 0 < stop["pairs"] <= 16 == stop["samples"]
    assert set(stop["scores"]) == {"3", "1.5", "1"} and all(len(scores) == 4 for scores in stop["scores"].values())
    assert not (tmp_path / one.name).exists()
