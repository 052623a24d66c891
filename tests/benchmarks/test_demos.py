"""Tests of the demos' committed results, and of what a demo reports about them."""

import json

import pytest

from benchmarks import demos
from benchmarks.tables import demo_table
from seppo_fast.commands.demo import RECIPES, SFT_ALONE

RESULTS = {RECIPES[clips]: demos.RESULTS / f"demo{'-video' * clips}.json" for clips in (False, True)}


def committed(recipe):
    return json.loads(RESULTS[recipe].read_text(encoding="utf-8"))


@pytest.mark.parametrize("recipe", SFT_ALONE)
def test_a_demo_quotes_the_committed_figure_of_plain_fine_tuning(recipe):
    assert SFT_ALONE[recipe] == demos.sft_lines(committed(recipe))


@pytest.mark.parametrize("recipe", RESULTS)
def test_committed_runs_were_healthy_under_three_seeds(recipe):
    result = committed(recipe)
    runs = [row for row in result["rows"] if row["kind"] == "demo"]
    assert [row["seed"] for row in runs] == [1, 2, 3]
    assert all(row["warnings"] == [] for row in runs)
    assert demo_table(result).count("| the demo |") == 3


def test_plain_fine_tuning_is_the_recipe_without_its_losers(tmp_path):
    ours, sft = (demos.settings("demo.yaml", kind, 3, tmp_path) for kind in ("demo", "sft"))
    assert (ours.seed, sft.seed, sft.objective, sft.train.sft_weight) == (3, 3, "sft", 0)
    assert sft.train.model_copy(update={"sft_weight": ours.train.sft_weight}) == ours.train


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    ran = []

    def run(kind, config):
        ran.append((kind, config.seed))
        gain = {"base": 0.5, "difference": 0.1 * config.seed, "low": 0.0, "high": 0.2, "items": 4}
        return {
            "title": demos.TITLES[kind],
            "kind": kind,
            "seed": config.seed,
            "commit": "c",
            "gains": {"3": gain},
            "seconds": 2.0,
        }

    monkeypatch.setattr(demos, "run", run)
    words = ["--seeds", "5", "6", "--scratch", str(tmp_path), "--json", str(tmp_path / "result.json")]
    assert demos.main(words) == 0 and demos.main(words) == 0
    assert ran == [("demo", 5), ("demo", 6), ("sft", 5), ("sft", 6)]
    result = json.loads((tmp_path / "result.json").read_text())
    assert demos.sft_lines(result)[0].endswith("+0.550 at guidance 3 (mean of 2 seeds)")
    assert "| SFT, same winners and updates | 6 | +0.600 [+0.000, +0.200] |" in demo_table(result)
