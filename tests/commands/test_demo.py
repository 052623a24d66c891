"""Which rows the demo's picture shows, what the demo prints, and its figure for plain fine-tuning."""

import numpy as np
import pytest

from seppo_fast.commands import demo
from seppo_fast.config.load import read_config
from seppo_fast.evaluation.statistics import paired_difference


def comparison(base, aligned, guidance=3.0):
    scores = {"base": np.array(base, float), "aligned": np.array(aligned, float)}
    return demo.Comparison(guidance, {}, scores, paired_difference(*scores.values()))


def test_the_first_changed_rows_and_some_at_random_no_prompt_twice():
    prompts = [f"prompt {row // 2}" for row in range(40)]  # two samples of each
    scores = {"base": np.zeros(40), "aligned": np.zeros(40)}
    scores["aligned"][[1, 6, 12, 20, 30]] = 1  # row 1 is its prompt's second sample; only the first can be shown
    changed, drawn = demo.shown_rows(prompts, scores)
    assert changed == [6, 12, 20]
    assert len(drawn) == 3 and not set(drawn) & set(changed) and all(row % 2 == 0 for row in drawn)
    assert demo.shown_rows(prompts, scores) == (changed, drawn)
    worse = {"base": scores["aligned"], "aligned": scores["base"]}
    assert demo.shown_rows(prompts, worse) == (changed, drawn)  # the rule looks for differences, not for gains


def test_each_guidance_has_its_lines_and_no_gain_is_said():
    better = comparison([0.2, 0.4, 0.8, 0.1], [0.7, 0.8, 1.0, 0.5])
    none = comparison([0.2, 0.4, 1.0, 0.1], [0.3, 0.3, 1.0, 0.1], guidance=1.5)
    said = "\n".join(demo.lines([better, none], 12.3))
    assert "guidance 3: judge's score, base -> aligned: 0.375 -> 0.750" in said
    assert said.count("no gain shown") == 1 and said.endswith("no gain shown")
    assert "whole prompts right: 0.000 -> 0.250" in said and "whole prompts right: 0.250 -> 0.250" in said


@pytest.mark.parametrize("recipe", demo.RECIPES.values())
def test_the_figure_of_plain_fine_tuning_is_of_the_recipe_alone(recipe, monkeypatch):
    monkeypatch.setattr(demo, "SFT_ALONE", {recipe: ("a line",)})
    config = read_config(recipe)
    assert demo.sft_lines(config.model_copy(update={"seed": 7, "output": "elsewhere"})) == ["for comparison, a line"]
    other = config.train.model_copy(update={"updates": 7})
    assert demo.sft_lines(config.model_copy(update={"train": other})) == []
