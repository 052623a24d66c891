"""The comparison of all methods: its configurations, where runs are read, what is counted, its tables."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import methods
from benchmarks.ablations.piece import changed
from benchmarks.ablations.rows import GUIDANCE
from benchmarks.comparison.counts import Counts
from benchmarks.comparison.piece import Finished, reached, run_piece
from benchmarks.comparison.rows import BUDGETS, FROM_ABLATION, PROMPTS, ROWS, STUDIES, Piece, pieces
from benchmarks.comparison.tables import best_rates, method_tables, tables
from benchmarks.harness.counters import count_flops, unet_flops
from benchmarks.harness.work import Work
from seppo_fast.config.load import read_config
from seppo_fast.config.objectives import OBJECTIVES
from seppo_fast.evaluation.statistics import paired_difference
from seppo_fast.methods.generation import Generation
from seppo_fast.methods.rewards.scoring import LatentScorer
from seppo_fast.models.registry import load_family
from seppo_fast.train import train
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import tiny_config


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


LABELS = {"data": {"source": "shapes-made:20"}}
REWARD = {"data": {"prompt_dropout": 0}, "rl": {"reward": "brightness"}}
STEPS = 2  # of the sampler, guided


@pytest.mark.parametrize(
    ("objective", "sections", "per_pair", "samples", "extra"),
    [
        ("sft", {}, 3, 0, 0),
        ("seppo", {}, 8 + 2 * STEPS, 12, 0),
        ("diffusion-dpo", LABELS, 8, 0, 0),
        ("mapo", LABELS | {"train": {"beta": 0.1}}, 6, 0, 0),
        ("kto", LABELS, 4, 0, 12),  # the offset is estimated from all rows of so small an update
        # A sample in two steps; each step trained with guidance, and in the second update compared with the old policy.
        ("ddpo", REWARD, None, 12, 0),
        ("grpo", REWARD | {"rl": {"reward": "brightness", "samples_per_prompt": 3}}, None, 12, 0),
    ],
)
def test_an_iterations_counts_are_those_of_the_formulas(tiny, tmp_path, objective, sections, per_pair, samples, extra):
    """Two updates of 6 pairs: rows through the network, a backward counted as two forwards."""
    sections = sections | {"train": {"updates": 2} | sections.get("train", {})}
    quiet = {"log": {"health_every": 0, "sample_every": 0}}
    config = tiny_config(tiny, tmp_path, objective=objective, **quiet, **sections)
    counts, seen = Counts(), []

    def observe(trainer, updates):
        if not updates:
            counts.follow(trainer)
        with counts.paused():  # what judging does is not counted
            trainer.family.decode(torch.zeros(3, 4, 8, 8))
        seen.append(counts.used(before=100))

    with counts.counting():
        train(config, observe)
    if per_pair is None:
        trained = seen[2]["pairs"]
        old = trained - seen[1]["pairs"]
        assert 0 < old < trained <= 12 * STEPS == 24
        expected = 12 * 2 * STEPS + 2 * 3 * trained + 2 * old
    else:
        assert [one["pairs"] for one in seen] == [0, 6, 12]
        expected = 12 * per_pair + extra
    assert seen[0]["rows"] == 100 and seen[2]["rows"] == 100 + expected and seen[2]["samples"] == samples
    rewarded = 12 if config.row.reward else 0
    assert seen[2]["decoded"] == seen[2]["scored"] == rewarded


def test_counting_ends_with_its_block():
    calls = Generation.__call__, LatentScorer.__call__
    with suppress(Finished), Counts().counting():
        assert Generation.__call__ != calls[0] and LatentScorer.__call__ != calls[1]
        raise Finished
    assert (Generation.__call__, LatentScorer.__call__) == calls


def test_what_the_page_says_of_runs_and_of_decoding():
    page = (Path(methods.__file__).parents[1] / "docs" / "comparison.md").read_text(encoding="utf-8")
    family = load_family(read_config("demo.yaml"), torch.device("cpu"))
    decoding = count_flops(lambda: family.decode(torch.zeros(1, *family.latent_shape(32)))) / unet_flops("shapes")
    assert f"as many FLOP as {decoding:.1f} rows" in page
    runs = [piece for study in STUDIES for piece in pieces(study, dict.fromkeys(ROWS, 1e-4))]
    assert f"{1 + len(runs)} runs: the base" in page and f"each of {len(ROWS)} methods" in page
    assert f"{PROMPTS * 12 * 2 * len(GUIDANCE):,} rows each" in page


def test_budgets_are_used_up_at_the_end_of_an_iteration_if_samples_are_made_ahead():
    left = {"pairs": 5120, "samples": 1280, "rows": 71_680}
    seppo = {"samples": 1280, "pairs": 31 * 128, "rows": 31 * 1024 + 1280 * 24}  # the samples of updates 31 to 40 exist
    assert reached(seppo, left, 31, 10) == []
    assert reached(seppo | {"pairs": 5120, "rows": 71_680}, left, 40, 10) == ["pairs", "samples", "rows"]
    sft = {"samples": 0, "pairs": 39 * 128, "rows": 39 * 384}
    assert reached(sft, left, 39, 10) == []
    assert reached(sft | {"pairs": 5018}, left, 39, 10) == ["pairs"]  # 98.01 %
    assert reached(sft | {"pairs": 5017}, left, 39, 10) == []
    assert reached(sft | {"pairs": 9999, "rows": 70_300}, {"rows": 71_680}, 183, 10) == ["rows"]


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_rows_with_a_recipe_of_their_own_have_its_settings(tmp_path, name):
    recipe = read_config(f"demo-{name}.yaml")
    row = changed("demo.yaml", Piece("table", name, recipe.train.learning_rate, 1).settings(), tmp_path, tmp_path)
    assert row.rl == recipe.rl.model_copy(update={"samples_per_prompt": 8}) and recipe.samples_per_prompt == 8
    assert row.sampler == recipe.sampler and row.reference.uses == recipe.reference.uses
    assert row.data == recipe.data.model_copy(update={"cache": row.data.cache})
    own = {"updates": row.train.updates, "beta": row.train.beta}  # neither method has a beta
    assert row.train == recipe.train.model_copy(update=own)


def piece(row, seed, gain, *, rate=1e-5, study="table", reached=("pairs", "samples", "rows"), rng=None):
    scores = (rng or np.random.default_rng(seed)).normal(0.5 + gain, 0.1, 40).tolist()
    scales = {"3": scores, "1.5": scores} | ({"1": scores} if ROWS[row].by_judge else {})
    stop = {"update": 7, "reached": list(reached), "pairs": 10, "samples": 5, "rows": 99, "seconds": 3.0}
    stop |= {"decoded": 4, "scored": 6} if ROWS[row].by_judge else {"samples": 0, "decoded": 0, "scored": 0}
    told = {"study": study, "row": row, "rate": rate, "seed": seed, "commit": "abc", "torch": "2.0", "seconds": 60}
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
    by_budget = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()[2:]]
        for part in text.split("\n\n")
        if part.startswith("| method")
    ]
    assert len(by_budget) == len(BUDGETS) and {len(lines) for lines in by_budget} == {len(ROWS) + len(FROM_ABLATION)}
    assert {len(cells) for lines in by_budget for cells in lines} == {13}
    # Those of the judge come last; then those that are missing, each with the reason.
    assert [cells[0] for cells in by_budget[2][:3]] == ["MaPO", "SePPO", "*DiffusionNFT*"]
    assert by_budget[2][2][2:10] == ["1e-05", "2", "7", "10", "5", "6", "99", "3"]
    absent = [{cells[0]: cells[10] for cells in lines[2:] if not cells[2]} for lines in by_budget]
    assert absent[0]["MaPO"] == "not reached" and absent[1]["MaPO"] == "generates no samples"
    assert "MaPO" not in absent[2]
    assert {absent[budget]["SFT"] for budget in range(3)} == {"not measured yet"}
    results["nft1"]["stops"][0]["reached"] = results["nft2"]["stops"][0]["reached"] = ["rows"]
    assert method_tables(tables(results, {})).count(f"| *DiffusionNFT* | the judge |{'  |' * 8} not reached |") == 2
    assert "nft 60; torch 2.0, commits abc" in text and method_tables({"entries": []}) == "Not measured yet."


def test_rows_of_the_committed_ablation_have_the_same_prompts():
    ablation = Work("ablation", methods.ABLATION, methods.ABLATION).finished()
    base = ablation["base"]["scores"] | {"1": ablation["base"]["scores"]["3"]}
    made = tables({"base": {"commit": "abc", "scores": base}}, ablation)
    known = json.loads((methods.RESULTS / "ablation.json").read_text(encoding="utf-8"))
    assert made["prompts"] == PROMPTS == known["prompts"]
    for entry in made["entries"]:
        update = {"pairs": 40, "samples": 40, "rows": 187 if entry["row"] == "sft" else 40}[entry["budget"]]
        (row,) = [row for row in known["rows"] if (row["row"], row["update"]) == (entry["row"], update)]
        assert entry["rows"] == row["row_forwards"] >= 0.98 * BUDGETS["rows"] or entry["budget"] == "pairs"
        for scale in ("3", "1.5"):
            assert entry["gains"][scale]["low"] == pytest.approx(row[f"guidance {scale}"]["low"])
    assert len(made["entries"]) == 3 * len(FROM_ABLATION) - 1  # SFT generates no samples


def test_the_best_rate_is_that_of_development_prompts():
    results = {
        f"{rate}": piece("nft", 100, gain, rate=rate, study="rates")
        for rate, gain in ((1e-5, 0.0), (3e-5, 0.2), (1e-4, -0.3))
    }
    assert best_rates(results) == {"nft": 3e-5}
    results["3e-05"] |= {"stops": [], "diverged": "the gradient was non-finite"}
    assert best_rates(results) == {"nft": 1e-5}
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
    assert stop["reached"] == ["pairs", "rows"] and 0 < stop["pairs"] and stop["samples"] == stop["scored"]
    assert set(stop["scores"]) == {"3", "1.5", "1"} and all(len(scores) == 4 for scores in stop["scores"].values())
    assert not (tmp_path / one.name).exists()
