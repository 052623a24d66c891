"""Runs one piece of the comparison: trains a method, and reads the run where it has used up a budget."""

from __future__ import annotations

import io
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablations.piece import WINNERS, alone, changed, held_out, prepare
from benchmarks.ablations.rows import DEVELOPMENT_SEED, FIRST_STAGE_SEED, GUIDANCE, RATES
from benchmarks.comparison.counts import Counts
from benchmarks.comparison.rows import BUDGETS, ENOUGH, FIRST_STAGE_UPDATES, PROMPTS, RATE_SHARE, ROWS, Piece
from benchmarks.harness.provenance import commit
from benchmarks.harness.work import write_result
from seppo_fast.config.load import read_config
from seppo_fast.evaluation.judged import DEVELOPMENT, REPORT, judged_model, judged_pictures
from seppo_fast.shapes.world import SIZE
from seppo_fast.train import train
from seppo_fast.train.trainer import Trainer
from seppo_fast.utils.errors import NonFiniteError

BASE = "base"
_TINY = {
    "data.source": "shapes:16:11", "train.pairs_per_update": 16, "train.micro_batch": 16, "reference.uses": 1,
    "sampler.steps": 3,
}  # fmt: skip
SCALES = tuple(sorted({scale for row in ROWS.values() for scale in row.guidance}, reverse=True))


class Finished(Exception):
    """Ends a run that has used up its budgets."""


def reached(used: Mapping[str, int], left: Mapping[str, float], updates: int, length: int) -> list[str]:
    """Returns which budgets a run has used up.

    Samples are generated for a whole iteration of `length` updates at its start, together with the rows through the
    network that this takes. So a run with samples uses up a budget at the end of an iteration only.

    Args:
        used: what has been used of each budget.
        left: the budgets that were not used up before.
        updates: number of finished updates.
        length: updates per iteration.
    """
    if used["samples"] and updates % length:
        return []
    return [name for name, budget in left.items() if used[name] >= ENOUGH * budget]


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
        counts: what the run has done; the run must be started inside `counts.counting()`.
    """

    def __init__(
        self, budgets: dict[str, float], prompts: list[str], seed: int, guidance: tuple[float, ...], before: int
    ) -> None:
        self._left, self._prompts, self._seed, self._guidance = dict(budgets), prompts, seed, guidance
        self._before = before
        self.counts = Counts()
        self._began: float | None = None
        self._judging = 0.0
        self.found: list[dict[str, Any]] = []

    def __call__(self, trainer: Trainer, updates: int) -> None:
        if self._began is None:
            self.counts.follow(trainer)
            self._began = time.perf_counter()
        used = self.counts.used(self._before)
        names = reached(used, self._left, updates, trainer.config.train.updates_per_iteration)
        if not names:
            return
        began = time.perf_counter()
        entry: dict[str, Any] = {"update": updates, "reached": names, **used}
        entry["seconds"] = began - self._began - self._judging
        with self.counts.paused():
            entry["scores"] = {f"{scale:g}": self._scores(trainer, scale) for scale in self._guidance}
        self.found.append(entry)
        for name in names:
            del self._left[name]
        self._judging += time.perf_counter() - began
        if "rows" in names:
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
    if row.second_stage:
        budgets.pop("pairs", None)  # the first stage has trained as many
    prompts = held_out(selecting)[:PROMPTS]
    if quick:
        source = re.sub(r":\d+", ":16", settings.get("data.source", WINNERS), count=1)
        settings |= _TINY | {"data.source": source}
        budgets, prompts = {"pairs": 16, "rows": before + 32}, prompts[:4]
    reader = Reader(
        budgets, prompts, DEVELOPMENT if selecting else REPORT, GUIDANCE if selecting else row.guidance, before
    )
    diverged = ""
    with redirect_stdout(io.StringIO()), suppress(Finished), reader.counts.counting():
        try:
            train(changed("demo.yaml", settings, place, Path(folder) / "cache"), reader)
        except NonFiniteError as problem:  # a learning rate may be too high; it then stands last
            diverged = str(problem)
    shutil.rmtree(place)
    told: dict[str, Any] = {"study": piece.study, "row": piece.row, "rate": piece.rate, "seed": piece.seed}
    told |= {"diverged": diverged} if diverged else {}
    told |= {"commit": commit(), "torch": torch.__version__, "seconds": round(time.perf_counter() - began)}
    write_result(Path(results), piece.name, told | {"stops": reader.found})


def first_stage(seed: int, folder: Path, quick: bool) -> tuple[str, int]:
    """Returns the folder of weights that were fine-tuned first, training them if missing, and the rows this took."""
    place, updates = folder / f"first-stage-seed{seed}", 1 if quick else FIRST_STAGE_UPDATES
    settings: dict[str, Any] = {
        "objective": "sft", "seed": seed + FIRST_STAGE_SEED, "train.learning_rate": RATES[-1],
        "train.updates": updates, "train.sft_weight": 0.0, **(_TINY if quick else {}),
    }  # fmt: skip
    config = changed("demo.yaml", settings, place, folder / "cache")
    with alone(folder):
        if not (place / "weights").exists():
            with redirect_stdout(io.StringIO()):
                train(config)
    return str(place / "weights"), 3 * updates * config.train.pairs_per_update


def run_base(results: str, quick: bool = False) -> None:
    """Judges the base on the report prompts, in this process and on one thread, and writes the result."""
    began = time.perf_counter()
    prepare()
    config, prompts = read_config("demo.yaml"), held_out(selecting=False)[: 4 if quick else PROMPTS]
    judged = {f"{scale:g}": judged_model(config, prompts, REPORT, guidance=scale)[1] for scale in SCALES}
    scores = {scale: [round(float(score), 4) for score in found] for scale, found in judged.items()}
    made = {"commit": commit(), "usual": False, "seconds": round(time.perf_counter() - began), "scores": scores}
    write_result(Path(results), BASE, made)
