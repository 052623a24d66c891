"""The demo writes its scores where the model card finds them; a picture without a score does not count as 0."""

import json
from pathlib import Path

import numpy as np
import pytest

from seppo_fast.commands import demo
from seppo_fast.commands.export import export
from seppo_fast.config.load import read_config
from seppo_fast.evaluation.scores import read_scores
from seppo_fast.scorers import shapes as scored


def test_the_card_of_a_demo_quotes_what_the_demo_measured(tmp_path, monkeypatch, capsys):
    prompts = ["a small red circle", "a large blue square", "a small green triangle", "a large red square"]
    monkeypatch.setattr(demo, "prompt_sets", lambda source: (prompts, prompts))
    given, score_all = [], scored.judge.score_all

    def judge_without_one(*arguments):
        given.append(score_all(*arguments))
        return np.where(np.arange(4) == 1, np.nan, given[-1])

    monkeypatch.setattr(scored.judge, "score_all", judge_without_one)
    config = read_config("demo.yaml")
    changes = {
        "output": str(tmp_path / "run"),
        "data": config.data.model_copy(update={"source": "shapes:8:11", "cache": str(tmp_path / "cache")}),
        "train": config.train.model_copy(update={"updates": 1, "pairs_per_update": 2}),
        "reference": config.reference.model_copy(update={"uses": 1}),
        "sampler": config.sampler.model_copy(update={"steps": 2}),
        "evaluation": config.evaluation.model_copy(update={"guidance": (1.5,)}),
    }
    config = config.model_copy(update=changes)
    demo.demo(config)
    run = Path(changes["output"])
    (result,), scores = json.loads((run / "result.json").read_text())["comparisons"], read_scores(run)
    assert result["guidance"] == 1.5 and "(guidance 1.5)" in scores.what
    names = ("base", "other", "low", "high", "items", "left_out")
    paired = scores.paired
    assert tuple(result[name] for name in names) == tuple(getattr(paired, name) for name in names)
    assert scores.update == 1 and not scores.average and "4 pictures" in scores.what
    base, aligned = (np.delete(one, 1) for one in given[-2:])
    assert (paired.items, paired.left_out) == (3, 1)
    assert paired.base == pytest.approx(base.mean()) and paired.other == pytest.approx(aligned.mean())
    assert result["aligned_all_right"] == pytest.approx((aligned == 1).mean())
    assert f"judge after 1 updates: {np.delete(given[1], 1).mean():.3f} (3 development" in capsys.readouterr().out
    card = (export(run) / "README.md").read_text()
    assert f"Scores: {scores}." in card and "1 without a score left out" in card and "other weights" not in card

    def judge_that_fails(*arguments):
        raise ValueError("no picture")

    for name in ("scores.json", "result.json"):
        (run / name).unlink()
    monkeypatch.setattr(demo, "train", lambda *_: run / "weights")
    monkeypatch.setattr(scored.judge, "score_all", judge_that_fails)
    with pytest.raises(ValueError, match="no picture"):
        demo.demo(config)
    assert not (run / "scores.json").exists() and not (run / "result.json").exists()
