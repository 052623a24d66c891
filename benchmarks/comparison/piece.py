"""Runs one piece of the comparison: trains a method, and reads the run where it has used up a budget."""

from __future__ import annotations

import io
import shutil
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablations.piece import Rows, alone, changed, held_out, prepare
from benchmarks.ablations.rows import DEVELOPMENT_SEED, FIRST_STAGE_SEED, GUIDANCE, RATES
from benchmarks.comparison.rows import BUDGETS, ENOUGH, FIRST_STAGE_UPDATES, RATE_SHARE, ROWS, Piece
from benchmarks.harness.provenance import commit
from benchmarks.harness.work import write_result
from seppo_fast.config.load import read_config
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_model, judged_pictures
from seppo_fast.methods.generation import Generation, Keys
from seppo_fast.shapes.world import SIZE
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer

BASE = "base"
_GENERATE = Generation.__call__  # a process runs several pieces, each of which replaces it
SCALES = tuple(sorted({scale for row in ROWS.values() for scale in row.guidance}, reverse=True))


class Finished(Exception):
    """Ends a run that has used up its budgets."""


class Counts:
    """Counts what a run does: rows through the network, rows of loss, generated samples.

    Attributes:
        network: the rows through the network; see `Rows`.
        pairs: rows of loss: pairs, samples or steps of the sampler, by the method.
        samples: generated samples.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.network = Rows(trainer.policy)
        self.pairs, self.samples = 0, 0
        self._count(trainer)

    def _count(self, trainer: Trainer) -> None:
        step = trainer.learner.step

        def counted_step(batch: Any, update: int) -> dict[str, float]:
            rows = trainer.method.rows(batch)
            self.pairs += trainer.config.train.pairs_per_update if rows is None else rows
            return step(batch, update)

        def counted_generation(own: Generation, keys: Keys, *rest: Any, **more: Any) -> Tensor:
            self.samples += len(keys)
            return _GENERATE(own, keys, *rest, **more)

        trainer.learner.step = counted_step  # type: ignore[method-assign]
        Generation.__call__ = counted_generation  # type: ignore[method-assign, assignment]

    def used(self, before: int) -> dict[str, int]:
        """Returns what has been used of each budget; `before` are rows of an earlier stage."""
        return {"pairs": self.pairs, "samples": self.samples, "rows": self.network.equivalent + before}


class Reader:
    """Judges a run where it has used up a budget; pass it to `train` as `observe`.

    Args:
        budgets: the budgets, by name; the run ends when the rows are used up.
        prompts: held-out prompts.
        seed: seed of the starting noise.
        guidance: guidance scales to judge at.
        before: rows that an earlier stage passed through the network.

    Attributes:
        found: one entry per update at which a budget was reached.
    """

    def __init__(
        self, budgets: dict[str, float], prompts: list[str], seed: int, guidance: tuple[float, ...], before: int
    ) -> None:
        self._left, self._prompts, self._seed, self._guidance = dict(budgets), prompts, seed, guidance
        self._before = before
        self._counts: Counts | None = None
        self._began = self._judging = 0.0
        self.found: list[dict[str, Any]] = []

    def __call__(self, trainer: Trainer, updates: int) -> None:
        if self._counts is None:
            self._counts, self._began = Counts(trainer), time.perf_counter()
        used = self._counts.used(self._before)
        reached = [name for name, budget in self._left.items() if used[name] >= ENOUGH * budget]
        if not reached:
            return
        began, self._counts.network.paused = time.perf_counter(), True
        entry: dict[str, Any] = {"update": updates, "reached": reached, **used}
        entry["seconds"] = began - self._began - self._judging
        entry["scores"] = {f"{scale:g}": self._scores(trainer, scale) for scale in self._guidance}
        self.found.append(entry)
        for name in reached:
            del self._left[name]
        self._counts.network.paused = False
        self._judging += time.perf_counter() - began
        if "rows" in reached:
            raise Finished

    def _scores(self, trainer: Trainer, scale: float) -> list[float]:
        # As the demo is judged, whatever the method sampled with.
        settings = read_config("demo.yaml").sampler.model_copy(update={"guidance": scale})
        sampler = trainer.family.sampler(settings, trainer.family.latent_shape(SIZE))
        _, scores = judged_pictures(
            trainer.family, trainer.denoiser, trainer.policy, sampler, self._prompts, self._seed
        )
        return [round(float(score), 4) for score in scores]


def run_piece(piece: Piece, folder: str, results: str, quick: bool = False) -> None:
    """Trains and reads a piece from its beginning, in this process and on one thread, and writes its result.

    Args:
        piece: the piece of work.
        folder: folder for runs and caches; the run's own subfolder is removed before and afterwards.
        results: folder for the result files; each is written atomically.
        quick: do very little, as a smoke test.
    """
    began = time.perf_counter()
    prepare()
    row, selecting = ROWS[piece.row], piece.seed == DEVELOPMENT_SEED
    place = Path(folder) / piece.name
    shutil.rmtree(place, ignore_errors=True)
    settings, before = piece.settings(), 0
    if row.second_stage:
        settings["model.path"], before = first_stage(piece.seed, Path(folder), quick)
    budgets: dict[str, float] = {"rows": RATE_SHARE * BUDGETS["rows"]} if selecting else dict(BUDGETS)
    prompts = held_out(selecting)
    if quick:
        settings |= {"train.pairs_per_update": 16, "train.micro_batch": 16, "sampler.steps": 3}
        budgets, prompts = {"pairs": 16, "rows": before + 32}, prompts[:4]
    reader = Reader(
        budgets, prompts, DEVELOPMENT if selecting else REPORT, GUIDANCE if selecting else row.guidance, before
    )
    with redirect_stdout(io.StringIO()), suppress(Finished):
        train(changed("demo.yaml", settings, place, Path(folder) / "cache"), reader)
    shutil.rmtree(place)
    told = {"study": piece.study, "row": piece.row, "rate": piece.rate, "seed": piece.seed}
    told |= {"commit": commit(), "torch": torch.__version__, "seconds": round(time.perf_counter() - began)}
    write_result(Path(results), piece.name, told | {"stops": reader.found})


def first_stage(seed: int, folder: Path, quick: bool) -> tuple[str, int]:
    """Returns the folder of weights that were fine-tuned first, training them if missing, and the rows this took."""
    place, updates = folder / f"first-stage-seed{seed}", 1 if quick else FIRST_STAGE_UPDATES
    pairs = 16 if quick else 128
    settings: dict[str, Any] = {
        "objective": "sft", "seed": seed + FIRST_STAGE_SEED, "train.learning_rate": RATES[-1],
        "train.updates": updates, "train.sft_weight": 0.0, "train.pairs_per_update": pairs,
    }  # fmt: skip
    with alone(folder):
        if not (place / "weights").exists():
            with redirect_stdout(io.StringIO()):
                train(changed("demo.yaml", settings, place, folder / "cache"))
    return str(place / "weights"), 3 * updates * pairs


def run_base(results: str, quick: bool = False) -> None:
    """Judges the base on the report prompts, in this process and on one thread, and writes the result."""
    began = time.perf_counter()
    prepare()
    config, prompts = read_config("demo.yaml"), held_out(selecting=False)[: 4 if quick else None]
    judged = {f"{scale:g}": judged_model(config, prompts, REPORT, guidance=scale)[1] for scale in SCALES}
    scores = {scale: [round(float(score), 4) for score in found] for scale, found in judged.items()}
    made = {"commit": commit(), "usual": False, "seconds": round(time.perf_counter() - began), "scores": scores}
    write_result(Path(results), BASE, made)
