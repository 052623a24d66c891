"""Makes output folders of `seppo-fast score`, and files of answers, for tests of the human comparison."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from seppo_fast.evaluation.human.answers import answers_digest
from seppo_fast.evaluation.human.plan import Trial
from seppo_fast.evaluation.human.study import Study

MODELS = ("basemodelname", "tunedmodelname")
DIGESTS = {"basemodelname": "0123456789abcdef-base", "tunedmodelname": "fedcba9876543210-tuned"}


def picture(seed: int, height: int = 23, width: int = 31) -> np.ndarray:
    """Returns a smooth coloured picture (H, W, 3), different for each seed."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR))


def score_folder(
    folder: Path, prompts: Sequence[str], *, samples: int = 1, clips: bool = False, models: Sequence[str] = MODELS
) -> Path:
    """Writes `items.json` and its media, which hold the model's name in their metadata."""
    items = []
    for index, prompt in enumerate(prompts):
        for sample in range(samples):
            files = {}
            for number, model in enumerate(models):
                name = f"media/{DIGESTS.get(model, model)}/{index}-{sample}{'.webp' if clips else '.png'}"
                files[model] = name
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                seed = 1000 * index + 10 * sample + number
                if clips:
                    frames = [Image.fromarray(picture(100 * seed + frame)) for frame in range(5)]
                    frames[0].save(
                        folder / name, save_all=True, append_images=frames[1:], duration=80, loop=0, lossless=True,
                        exif=b"Exif\x00\x00" + model.encode(),
                    )  # fmt: skip
                else:
                    told = PngImagePlugin.PngInfo()
                    told.add_text("model", model)
                    Image.fromarray(picture(seed)).save(folder / name, pnginfo=told)
            items.append(
                {"id": f"{index}-{sample}", "prompt": prompt, "prompt_index": index, "sample": sample, "seed": 7,
                 "files": files}
            )  # fmt: skip
    digests = {model: DIGESTS.get(model, model) for model in models}
    (folder / "items.json").write_text(json.dumps({"schema": 1, "models": digests, "items": items}))
    return folder


def answer_file(
    folder: Path,
    study: Study,
    rater: str,
    choose: Callable[[int, Trial, str], str | None],
    changed: dict[str, object] | None = None,
) -> Path:
    """Writes a rater's answers: `choose` returns `left`, `same`, `right`, or None for no answer.

    `changed` replaces fields of the finished file.
    """
    rows = [
        [place, question, side, 1500]
        for place, trial in enumerate(study.raters[rater])
        for question in study.questions
        if (side := choose(place, trial, question))
    ]
    tree = {"schema": 1, "study": study.id, "rater": rater, "answers": rows}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"answers-{rater}.json"
    file.write_text(json.dumps(tree | {"digest": answers_digest(study.id, rater, rows)} | (changed or {})))
    return file


def side_of(trial: Trial, model: str) -> str:
    """Returns the side of a pair on which a model's medium is."""
    return "left" if trial.left.model == model else "right"
