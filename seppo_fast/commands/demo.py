"""`seppo-fast demo [--clips]`: aligns the embedded model with clean examples, and judges base and aligned exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.grids import animate, side_by_side
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_model, judged_pictures, prompt_sets
from seppo_fast.evaluation.scores import Scores
from seppo_fast.evaluation.statistics import given, paired_difference
from seppo_fast.runs.journal import read_journal
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_PROMPTS, CURVE_EVERY = 120, 10
CURVE_CLIPS = 40  # a clip takes as long as several pictures
GRID_PROMPTS = 6


class ScoreCurve:
    """Judge scores during training, on development prompts; an observer of `train`."""

    def __init__(self, prompts: list[str]) -> None:
        self.points: list[tuple[int, float]] = []
        self._prompts = prompts

    def __call__(self, trainer: Trainer, updates: int) -> None:
        if updates % CURVE_EVERY == 0 or updates == trainer.config.train.updates:
            _, scores = judged_pictures(
                trainer.family, trainer.denoiser, trainer.policy, trainer.sampler, self._prompts, DEVELOPMENT
            )
            scored = given(scores)
            self.points.append((updates, float(scored.mean())))
            print(f"judge after {updates} updates: {scored.mean():.3f} ({len(scored)} development prompts)", flush=True)


def demo(config: Config) -> None:
    """Trains, judges base and aligned on held-out prompts at the same seeds, writes picture, scores, `result.json`."""
    started = time.perf_counter()
    development, prompts = prompt_sets(open_source(config.data.source))
    curve = ScoreCurve(development[: CURVE_CLIPS if config.model.motion_adapter else CURVE_PROMPTS])
    weights = train(config, curve)
    folder = Path(config.output)
    print(f"judging base and aligned on {len(prompts)} held-out prompts ...", flush=True)
    pictures, scores = {}, {}
    for name, trained in {"base": None, "aligned": weights}.items():
        pictures[name], scores[name] = judged_model(config, prompts, REPORT, trained)
    difference = paired_difference(*(by_prompt(prompts, scores[name]) for name in ("base", "aligned")))
    rows = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)][:GRID_PROMPTS]
    shown = {name: images[rows] for name, images in pictures.items()}
    draw(folder, curve.points, [prompts[row] for row in rows], shown)
    result = dataclasses.asdict(difference) | {
        "base_all_right": float(np.mean(given(scores["base"]) == 1)),
        "aligned_all_right": float(np.mean(given(scores["aligned"]) == 1)),
        "seconds": time.perf_counter() - started,
        "torch": version("torch"),
        "cores": os.cpu_count(),
    }
    shape = "clips" if config.model.motion_adapter else "pictures"
    measured = Scores(
        what=f"the embedded judge's score, share of attributes, on {len(prompts)} {shape} of held-out prompts",
        update=config.train.updates,
        average=bool(config.train.ema_decay),
        paired=difference,
    )
    measured.write(folder)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"picture: {folder / 'demo.png'}")
    print(f"whole prompts right: {result['base_all_right']:.3f} -> {result['aligned_all_right']:.3f}")
    print(f"seconds: {result['seconds']:.0f}")
    print(f"judge's score, base -> aligned: {difference}")
    if difference.low <= 0:
        print("the interval includes zero: no gain shown")


def by_prompt(prompts: Sequence[str], scores: np.ndarray) -> np.ndarray:
    """The mean score of each prompt: samples of one prompt are not independent, prompts are."""
    _, rows = np.unique(prompts, return_inverse=True)
    return np.bincount(rows, scores) / np.bincount(rows)


def draw(folder: Path, points: list[tuple[int, float]], prompts: list[str], pictures: dict[str, np.ndarray]) -> None:
    """Writes `demo.png`: four curves of the run, base beside aligned at the same seeds; of clips `demo.webp` too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    log = read_journal(folder)
    updates = [entry["update"] for entry in log]
    clips = pictures["base"].ndim == 5
    layout: dict[str, Any] = {"figsize": (15, 8), "height_ratios": (1, 2)} if clips else {"figsize": (15, 7.5)}
    figure, axes = plt.subplot_mosaic("ABCD;GGGG" if clips else "ABG;CDG", layout="constrained", **layout)
    panels = {
        "winner error (mean squared error)": {"policy": "winner_error", "reference": "ref_winner_error"},
        "error on the reference's samples": {"policy": "loser_error", "reference": "ref_loser_error"},
        "reject rate (AAF)": {"share of pairs": "aaf_rate"},
    }
    for panel, (title, lines) in zip("ABC", panels.items(), strict=True):
        _curve(axes[panel], title, updates, {name: [entry[key] for entry in log] for name, key in lines.items()})
    judged, scores = zip(*points, strict=True)
    _curve(axes["D"], "judge's score (development prompts)", judged, {"policy": scores})
    axes["G"].imshow(side_by_side(prompts, pictures, cell=64 if clips else 128))
    axes["G"].axis("off")
    axes["G"].set_title("held-out prompts, same seeds")
    figure.savefig(folder / "demo.png", dpi=90)
    plt.close(figure)
    if clips:
        animate(folder / "demo.webp", prompts, pictures)


def _curve(axes: Axes, title: str, x: Sequence[float], lines: dict[str, Sequence[float]]) -> None:
    for name, y in lines.items():
        axes.plot(x, y, label=name)
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.legend()
    axes.grid(alpha=0.3)
