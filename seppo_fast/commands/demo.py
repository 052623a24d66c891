"""`seppo-fast demo [--clips]`: aligns an embedded model to clean examples, and judges it against the base."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seppo_fast.config.load import read_config
from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.grids import animate, side_by_side
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_model, judged_pictures, prompt_sets
from seppo_fast.evaluation.scores import Scores
from seppo_fast.evaluation.statistics import PairedDifference, cluster, given, paired_difference
from seppo_fast.runs.folder import CURVE, is_begun
from seppo_fast.runs.journal import read_journal
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.files import read_json, write_atomically
from seppo_fast.utils.logging import warn
from seppo_fast.utils.random import keyed_rng

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPES = {False: "demo.yaml", True: "demo-video.yaml"}  # by whether the demo uses clips
CURVE_PROMPTS, CURVE_EVERY = 120, 10
CURVE_CLIPS = 24  # fewer, because a clip takes as long as several pictures
JUDGED = 600  # report prompts that are used; judging all of them would take longer than training
# Means over three training seeds on the same held-out prompts, from benchmarks/results; a test compares them with it.
SFT_ALONE: dict[str, tuple[str, ...]] = {
    "demo.yaml": (
        "SFT alone on the same winners, at under a quarter of the compute: +0.048 at guidance 3, "
        "+0.118 at guidance 1.5 (mean of 3 seeds)",
    ),
}
# Files in the run's folder: the held-out prompts, and what the demo measured, which it writes last.
PROMPTS, RESULT = "prompts.json", "result.json"
GRID_CHANGED, GRID_RANDOM = 3, 3  # rows of the picture; see `shown_rows`


class ScoreCurve:
    """An observer of `train` that records the judge's scores on development prompts during training.

    It also keeps them in a file, from which a resumed demo continues.

    Args:
        prompts: the development prompts.
        folder: the run's folder.

    Attributes:
        points: pairs (updates, mean score).
    """

    def __init__(self, prompts: list[str], folder: Path) -> None:
        self._prompts = prompts
        self._file = folder / CURVE
        self._started = time.perf_counter()
        self.points, self._before = _read_curve(self._file)

    def __call__(self, trainer: Trainer, updates: int) -> None:
        # Updates after the saved state are made again, and judged again.
        self.points = [point for point in self.points if point[0] <= updates]
        due = updates % CURVE_EVERY == 0 or updates == trainer.config.train.updates
        if due and updates not in dict(self.points):
            _, scores = judged_pictures(
                trainer.family, trainer.denoiser, trainer.policy, trainer.sampler, self._prompts, DEVELOPMENT
            )
            scored = given(scores)
            self.points.append((updates, float(scored.mean())))
            print(f"judge after {updates} updates: {scored.mean():.3f} ({len(scored)} development prompts)", flush=True)
        if updates:  # a run that ends without an update leaves nothing
            self._write()

    def seconds(self) -> float:
        """Returns the duration of this session and of those before it, up to their last update."""
        return self._before + time.perf_counter() - self._started

    def _write(self) -> None:
        content = json.dumps({"seconds": self.seconds(), "points": self.points})
        try:
            write_atomically(self._file, content.encode(), CheckpointError)
        except CheckpointError as problem:
            warn(f"training continues; a resumed demo would lack these scores of the judge: {problem}")


def _read_curve(file: Path) -> tuple[list[tuple[int, float]], float]:
    """Returns the points and the seconds of earlier sessions; empty and 0 if the file is missing or damaged."""
    try:
        saved = read_json(file)
        return [(int(updates), float(score)) for updates, score in saved["points"]], float(saved["seconds"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return [], 0.0


@dataclass(frozen=True)
class Comparison:
    """A comparison of base and aligned at one guidance scale, on the same prompts and seeds.

    Attributes:
        guidance: the guidance scale.
        pictures: the pictures `(N, H, W, 3)` or clips `(N, F, H, W, 3)` uint8, by the names "base" and "aligned".
        scores: their scores `(N,)`, by the same names.
        paired: the paired difference, one item per prompt.
    """

    guidance: float
    pictures: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    paired: PairedDifference

    def whole_prompts(self) -> dict[str, float]:
        """Returns the share of pictures in which every attribute is right, for base and aligned."""
        return {name: float(np.mean(given(scores) == 1)) for name, scores in self.scores.items()}

    def numbers(self) -> dict[str, Any]:
        """Returns the comparison as an entry of `result.json`."""
        right = {f"{name}_all_right": share for name, share in self.whole_prompts().items()}
        return {"guidance": self.guidance} | asdict(self.paired) | right


def compare(config: Config, prompts: list[str], weights: Path, guidance: float) -> Comparison:
    """Judges the base and a run's weights on report prompts at one guidance scale."""
    pictures, scores = {}, {}
    for name, trained in {"base": None, "aligned": weights}.items():
        print(f"judging {name} at guidance {guidance:g} on {len(prompts)} held-out prompts ...", flush=True)
        pictures[name], scores[name] = judged_model(config, prompts, REPORT, trained, guidance=guidance)
    paired = paired_difference(*(cluster(prompts, scores[name]) for name in ("base", "aligned")))
    return Comparison(guidance, pictures, scores, paired)


def demo(config: Config) -> None:
    """Trains, judges base and aligned on held-out prompts with the same seeds, and writes the results.

    The run's folder gets `demo.png` (with clips also `demo.webp`), `scores.json`, `result.json`, and `prompts.json`,
    with which `seppo-fast score` repeats the comparison.
    """
    development, prompts = prompt_sets(open_source(config.data.source))
    prompts = judged_prompts(prompts)
    clips = bool(config.model.motion_adapter)
    folder = Path(config.output)
    curve = ScoreCurve(development[: CURVE_CLIPS if clips else CURVE_PROMPTS], folder)
    weights = train(config, curve)
    (folder / PROMPTS).write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")
    scales = config.evaluation.guidance or (config.sampler.guidance,)
    comparisons = [compare(config, prompts, weights, scale) for scale in scales]
    first = comparisons[0]
    draw(folder, curve.points, prompts, first)
    shape = "clips" if clips else "pictures"
    measured = Scores(
        what=f"the embedded judge's score, share of attributes, on {len(prompts)} {shape} of held-out prompts "
        f"(guidance {first.guidance:g})",
        update=config.train.updates,
        average=bool(config.train.ema_decay),
        paired=first.paired,
    )
    measured.write(folder)
    seconds = curve.seconds()
    result = {
        "comparisons": [comparison.numbers() for comparison in comparisons],
        "seconds": seconds,
        "torch": version("torch"),
        "cores": os.cpu_count(),
    }
    (folder / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"picture: {folder / 'demo.png'}")
    for line in lines(comparisons, seconds):
        print(line)
    for line in sft_lines(config):
        print(line)


def demo_folder(usual: Path) -> Path:
    """Returns the folder for a demo: that of an unfinished demo, which is then resumed, or one that does not exist.

    Prints a line if it is not simply the usual folder, which does not exist yet.
    """
    numbered = (usual.with_name(f"{usual.name}-{number}") for number in itertools.count(2))
    for folder in itertools.chain([usual], numbered):
        if not folder.exists():
            if folder != usual:
                print(f"{usual} is kept; this demo is written to {folder}", flush=True)
            return folder
        if is_begun(folder) and not (folder / RESULT).exists():
            print(f"resuming the unfinished demo in {folder}; --output FOLDER starts another", flush=True)
            return folder
    raise AssertionError("the numbers do not end")


def judged_prompts(report: list[str]) -> list[str]:
    """Returns the prompts on which base and aligned are compared, out of all report prompts."""
    return report[:JUDGED]


def lines(comparisons: Sequence[Comparison], seconds: float) -> list[str]:
    """Returns the lines that report the demo's result."""
    said = [f"seconds: {seconds:.0f}"]
    for comparison in comparisons:
        right = comparison.whole_prompts()
        said.append(f"guidance {comparison.guidance:g}: judge's score, base -> aligned: {comparison.paired}")
        said.append(f"  whole prompts right: {right['base']:.3f} -> {right['aligned']:.3f}")
        if comparison.paired.low <= 0:
            said.append("  the interval includes zero: no gain shown")
    return said


def sft_lines(config: Config) -> list[str]:
    """Returns lines with the gain of plain fine-tuning on the same winners; empty if the recipe was changed."""
    name = RECIPES[bool(config.model.motion_adapter)]
    if _without_places(config) != _without_places(read_config(name)):
        return []
    return [f"for comparison, {line}" for line in SFT_ALONE.get(name, ())]


def _without_places(config: Config) -> dict[str, Any]:
    """Returns a configuration's settings without seed, folders, saving and logging."""
    tree = config.model_dump(exclude={"output", "seed", "save", "log"})
    tree["data"].pop("cache")
    return tree


def shown_rows(prompts: Sequence[str], scores: dict[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """Returns two lists of rows for the picture: the first whose scores differ, up or down, and some drawn at random.

    No prompt is shown twice. The draw depends only on the number of prompts.
    """
    firsts = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)]
    changed = [row for row in firsts if scores["base"][row] != scores["aligned"][row]][:GRID_CHANGED]
    order = keyed_rng(0, "demo picture", len(firsts)).permutation(len(firsts))
    drawn = [firsts[place] for place in order if firsts[place] not in changed][:GRID_RANDOM]
    return changed, drawn


def draw(folder: Path, points: list[tuple[int, float]], prompts: list[str], comparison: Comparison) -> None:
    """Writes `demo.png`: curves of the run, and base beside aligned at the same seeds; for clips also `demo.webp`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    changed, drawn = shown_rows(prompts, comparison.scores)
    shown = [prompts[row] for row in changed + drawn]
    pictures = {name: images[changed + drawn] for name, images in comparison.pictures.items()}
    log = read_journal(folder)
    updates = [entry["update"] for entry in log]
    clips = pictures["base"].ndim == 5
    layout: dict[str, Any] = {"figsize": (15, 8), "height_ratios": (1, 2)} if clips else {"figsize": (15, 7.5)}
    figure, axes = plt.subplot_mosaic("ABCD;GGGG" if clips else "ABG;CDG", layout="constrained", **layout)
    panels = {
        "winner error (mean squared error)": {"policy": "winner_error", "reference": "ref_winner_error"},
        "preference loss (0.693 where policy and reference agree)": {"policy": "preference_loss"},
        "reject rate (AAF)": {"share of pairs": "aaf_rate"},
    }
    for panel, (title, lines) in zip("ABC", panels.items(), strict=True):
        _curve(axes[panel], title, updates, {name: [entry[key] for entry in log] for name, key in lines.items()})
    judged, scores = zip(*points, strict=True)
    _curve(axes["D"], "judge's score (development prompts)", judged, {"policy": scores})
    axes["G"].imshow(side_by_side(shown, pictures, cell=64 if clips else 128))
    axes["G"].axis("off")
    axes["G"].set_title(
        f"held-out prompts, same seeds, guidance {comparison.guidance:g}:\n"
        f"the first {len(changed)} whose scores differ, then {len(drawn)} at random"
    )
    figure.savefig(folder / "demo.png", dpi=90)
    plt.close(figure)
    if clips:
        animate(folder / "demo.webp", shown, pictures)


def _curve(axes: Axes, title: str, x: Sequence[float], lines: Mapping[str, Sequence[float]]) -> None:
    for name, y in lines.items():
        axes.plot(x, y, label=name)
    axes.set_title(title)
    axes.set_xlabel("update")
    axes.legend()
    axes.grid(alpha=0.3)
