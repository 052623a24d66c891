"""What the demo's picture shows, what the demo prints, its figure for plain fine-tuning, and how it is resumed."""

import json

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


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function that returns the configuration of a demo with four updates, each of which is judged and saved."""
    prompts = ["a small red circle", "a large blue square"]
    monkeypatch.setattr(demo, "prompt_sets", lambda source: (prompts, prompts))
    monkeypatch.setattr(demo, "CURVE_EVERY", 1)

    def small(name):
        config = read_config("demo.yaml")
        sections = {
            "data": {"source": "shapes:8:11", "cache": str(tmp_path / "cache")},
            "train": {"updates": 4, "pairs_per_update": 4, "updates_per_iteration": 2, "learning_rate": 1e-3},
            "reference": {"uses": 1},
            "sampler": {"steps": 2},
            "save": {"minutes": 0},
            "log": {"sample_every": 0},
            "evaluation": {"guidance": (3.0,)},
        }
        changes = {key: getattr(config, key).model_copy(update=changed) for key, changed in sections.items()}
        return config.model_copy(update=changes | {"output": str(tmp_path / name)})

    return small


def drawn_points(monkeypatch, config, fails_at=None):
    """Runs a demo and returns the points of its curve; with `fails_at`, only until this update is to be judged."""
    points, judge = [], demo.judged_pictures
    monkeypatch.setattr(demo, "draw", lambda folder, given, *_: points.extend(given))

    def judged(family, denoiser, policy, *arguments):
        judged.calls += 1
        if judged.calls == fails_at:
            raise KeyboardInterrupt
        return judge(family, denoiser, policy, *arguments)

    judged.calls = 0
    with monkeypatch.context() as patched:
        patched.setattr(demo, "judged_pictures", judged)
        if fails_at:
            with pytest.raises(KeyboardInterrupt):
                demo.demo(config)
        else:
            demo.demo(config)
    return points, judged.calls


def test_a_resumed_demo_keeps_its_curve_and_its_seconds(small, tmp_path, monkeypatch):
    whole, calls = drawn_points(monkeypatch, small("whole"))
    assert [updates for updates, _ in whole] == [0, 1, 2, 3, 4] and calls == 5
    broken = small("broken")
    assert drawn_points(monkeypatch, broken, fails_at=4) == ([], 4)  # as update 3 is judged
    curve = tmp_path / "broken" / "curve.json"
    assert json.loads(curve.read_text())["points"] == [list(point) for point in whole[:3]]
    with monkeypatch.context() as patched:
        patched.setattr(demo, "judged_model", lambda *_, **__: 1 / 0)  # ends after the last update
        with pytest.raises(ZeroDivisionError):
            drawn_points(monkeypatch, broken)
    kept = json.loads(curve.read_text())
    curve.write_text(json.dumps(kept | {"seconds": 5000.0}))
    assert drawn_points(monkeypatch, broken) == (whole, 0)
    assert 5000 < json.loads((tmp_path / "broken" / "result.json").read_text())["seconds"] < 6000


def test_a_damaged_curve_is_begun_anew(tmp_path):
    for content in ("", "[]", '{"points": [[1]], "seconds": 2}', '{"points": 3}', '{"points": [[Infinity, 1]]}'):
        (tmp_path / "curve.json").write_text(content)
        assert demo.ScoreCurve([], tmp_path).points == []


def test_an_unfinished_demo_is_resumed_and_a_finished_one_kept(tmp_path, capsys):
    usual = tmp_path / "demo"
    assert demo.demo_folder(usual) == usual and capsys.readouterr().out == ""
    usual.mkdir()
    (usual / "config.yaml").write_text("seed: 1\n")
    assert demo.demo_folder(usual) == usual
    assert capsys.readouterr().out == f"resuming the unfinished demo in {usual}; --output FOLDER starts another\n"
    (usual / "result.json").write_text("{}")
    (tmp_path / "demo-2").mkdir()  # holds no run
    assert demo.demo_folder(usual) == tmp_path / "demo-3"
    assert capsys.readouterr().out == f"{usual} is kept; this demo is written to {tmp_path / 'demo-3'}\n"
    (tmp_path / "demo-2" / "config.yaml").write_text("seed: 1\n")
    assert demo.demo_folder(usual) == tmp_path / "demo-2"
