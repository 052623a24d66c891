"""The demo leaves its scores where the model card finds them."""

import json
from pathlib import Path

from seppo_fast import demo
from seppo_fast.config import read_config
from seppo_fast.export import export
from seppo_fast.scores import read_scores


def test_the_card_of_a_demo_quotes_what_the_demo_measured(tmp_path, monkeypatch):
    prompts = ["a small red circle", "a large blue square", "a small green triangle"]
    monkeypatch.setattr(demo, "prompt_sets", lambda source: (prompts, prompts))
    config = read_config("demo.yaml")
    changes = {
        "output": str(tmp_path / "run"),
        "data": config.data.model_copy(update={"source": "shapes:8:11", "cache": str(tmp_path / "cache")}),
        "train": config.train.model_copy(update={"updates": 1, "pairs_per_update": 2}),
        "sampler": config.sampler.model_copy(update={"steps": 2}),
    }
    demo.demo(config.model_copy(update=changes))
    run = Path(changes["output"])
    result, scores = json.loads((run / "result.json").read_text()), read_scores(run)
    assert (scores.base, scores.aligned, scores.low, scores.high, scores.items) == tuple(
        result[name] for name in ("base", "other", "low", "high", "items")
    )
    assert scores.update == 1 and not scores.average and "3 pictures" in scores.what
    card = (export(run) / "README.md").read_text()
    assert f"Scores: {scores}." in card and "other weights" not in card
